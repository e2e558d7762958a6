//! Laws that hold for every optimizer of the registry, on the CPU.

#[path = "common/extent.rs"]
mod extent;

use extent::is_brief;
use proptest::prelude::*;
use roptim::closure::Ask;
use roptim::cpu::Isa;
use roptim::hyper::{Choice, Range};
use roptim::rule::Sparse;
use roptim::rules::Method;
use roptim::store::StateValue;
use roptim::tensor::{RawTensor, Rows, Strides};
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, Preset, REGISTRY, TensorMut, TensorRef, Value};
use std::sync::Arc;

/// Numbers that look random, are the same on every run, and hold zeros of both signs.
fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|i| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            match i % 11 {
                3 => 0.0,
                7 => -0.0,
                _ => (x >> 11) as f64 / (1u64 << 53) as f64 - 0.5,
            }
        })
        .collect()
}

/// A value within a range, away from its edges.
fn inside(range: Range) -> Value {
    match range {
        Range::AtLeast(low) | Range::Above(low) => Value::Float(low + 0.1),
        Range::AtLeastOrInfinite(_) => Value::Float(2.0),
        Range::AtMost(high) => Value::Float(high - 0.5),
        Range::Finite => Value::Float(0.3),
        Range::From(low, high) | Range::Within(low, high) => Value::Float(low + 0.8 * (high - low)),
        Range::PairFrom(low, high) => Value::Pair([low + 0.4 * (high - low), low + 0.97 * (high - low)]),
        Range::PairAround(low, middle) => Value::Pair([(low + middle) / 2.0, middle + 0.5]),
        Range::PairOrdered(low) => Value::Pair([low + 0.02, low + 0.2]),
        Range::HalfPair(low) => Value::Pair([low + 1e-5, low + 0.1]),
        Range::Triple => Value::Triple([2.0, -1.5, 0.5]),
        Range::Whole(low, high) => Value::Int(high.min(low + 3)),
        Range::OrNone(range) => inside(*range),
        Range::OneOf(choices) => Value::Choice(choices[choices.len() - 1]),
        Range::Flag => Value::Bool(true),
    }
}

/// Values at the edge that a range just allows, and values just outside it.
fn edges(range: Range) -> (Vec<Value>, Vec<Value>) {
    let floats = |xs: &[f64]| xs.iter().copied().map(Value::Float).collect::<Vec<_>>();
    let pairs = |xs: &[[f64; 2]]| xs.iter().copied().map(Value::Pair).collect::<Vec<_>>();
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    match range {
        Range::AtLeast(low) => (floats(&[low]), floats(&[low - 1e-9, inf, nan])),
        Range::Above(low) => (floats(&[low + 1e-300]), floats(&[low, inf, nan])),
        Range::AtMost(high) => (floats(&[high]), floats(&[high + 1e-9, -inf, nan])),
        Range::AtLeastOrInfinite(low) => (floats(&[low, inf]), floats(&[low - 1e-9, nan])),
        Range::Finite => (floats(&[f64::MIN, f64::MAX]), floats(&[inf, -inf, nan])),
        Range::From(low, high) => (floats(&[low]), floats(&[low - 1e-9, high, nan])),
        Range::Within(low, high) => (floats(&[low, high]), floats(&[low - 1e-9, high + 1e-9, nan])),
        Range::PairFrom(low, high) => (pairs(&[[low, low]]), pairs(&[[low - 1e-9, low], [low, high], [nan, low]])),
        Range::PairAround(low, middle) => {
            let (a, b) = (low + 1e-9, middle + 1e-9);
            (pairs(&[[a, b]]), pairs(&[[low, b], [a, middle], [middle, b], [nan, b], [a, inf]]))
        }
        Range::PairOrdered(low) => (pairs(&[[low, low]]), pairs(&[[low - 1e-9, low], [low + 1.0, low], [low, inf]])),
        Range::HalfPair(low) => {
            let mut refused = pairs(&[[low - 1e-9, low], [low, low - 1e-9], [low, nan]]);
            refused.push(Value::HalfPair(low - 1e-9));
            (vec![Value::HalfPair(low), Value::Pair([low, low])], refused)
        }
        Range::Triple => (vec![Value::Triple([0.0; 3])], vec![Value::Triple([0.0, nan, 0.0])]),
        Range::Whole(low, high) => {
            let mut refused = vec![Value::Int(low - 1), Value::Float(low as f64 - 1.0)];
            refused.extend(high.checked_add(1).map(Value::Int));
            (vec![Value::Int(low), Value::Float(low as f64), Value::Int(high)], refused)
        }
        Range::OrNone(range) => {
            let (mut allowed, refused) = edges(*range);
            allowed.push(Value::None);
            (allowed, refused)
        }
        Range::OneOf(choices) => {
            let (inside, outside): (Vec<_>, Vec<_>) =
                Choice::ALL.iter().map(|c| c.0).partition(|c| choices.contains(c));
            (inside.into_iter().map(Value::Choice).collect(), outside.into_iter().map(Value::Choice).collect())
        }
        Range::Flag => (vec![Value::Bool(false), Value::Bool(true)], vec![]),
    }
}

/// A parameter of `n` elements in a shape that the preset takes; tensor rules get matrices, those that take
/// other shapes also vectors.
fn info(preset: &Preset, i: usize, n: usize, dtype: Dtype) -> ParamInfo {
    let vector = ParamInfo::vector(&i.to_string(), n, dtype);
    let takes_vectors = match preset.method {
        Method::Tensor(rule) => i.is_multiple_of(2) && rule.accept("", "", &[n], dtype).is_ok(),
        Method::Elementwise(_) | Method::Closure(_) => true,
    };
    if takes_vectors {
        return vector;
    }
    let rows = (1..=n).take_while(|r| r * r <= n).filter(|r| n.is_multiple_of(*r)).last().unwrap_or(0);
    ParamInfo { shape: vec![rows, n.checked_div(rows).unwrap_or(3)], ..vector }
}

/// A gradient of every element, as the preset takes it.
fn gradient<'a, F: roptim::real::Real>(preset: &Preset, g: &'a [F]) -> TensorRef<'a> {
    taken(preset, g.len(), TensorRef::from(g))
}

fn taken<'a>(preset: &Preset, len: usize, dense: TensorRef<'a>) -> TensorRef<'a> {
    match preset.declaration().sparse {
        Sparse::Required => dense.of_rows(Rows::new((0..len).collect(), 1, len).unwrap()),
        _ => dense,
    }
}

/// Settings that turn each switch and number of a preset away from its default, one at a time and
/// together where the rule allows it.
fn settings(preset: &Preset) -> Vec<Vec<(&'static str, Value)>> {
    let mut all = vec![vec![]];
    for hyper in preset.declaration().hypers.iter().filter(|h| !preset.fixed.contains(&h.name)) {
        let value = match hyper.range {
            Range::Flag => Value::Bool(true),
            Range::Finite => Value::Float(0.3),
            _ => inside(hyper.range),
        };
        let one = vec![(hyper.name, value)];
        let mut hypers = preset.hypers();
        if preset.set("test", &mut hypers, &one).is_ok() {
            all.push(one);
        }
    }
    let momentum = ("momentum", Value::Float(0.9));
    let together = [
        vec![momentum],
        vec![momentum, ("nesterov", Value::Bool(true)), ("weight_decay", Value::Float(0.1))],
        vec![momentum, ("dampening", Value::Float(0.5)), ("maximize", Value::Bool(true))],
        vec![momentum, ("centered", Value::Bool(true))],
        vec![("t0", Value::Float(1.0)), ("maximize", Value::Bool(true))],
        vec![("amsgrad", Value::Bool(true)), ("weight_decay", Value::Float(0.1)), ("maximize", Value::Bool(true))],
    ];
    all.extend(together.into_iter().filter(|changes| preset.set("", &mut preset.hypers(), changes).is_ok()));
    all
}

struct Run {
    preset: &'static Preset,
    settings: Vec<(&'static str, Value)>,
    lengths: Vec<usize>,
    threads: usize,
    isa: Isa,
    chunk: usize,
    steps: u64,
}

type Outcome = (Vec<Vec<u64>>, Vec<(usize, String, Vec<u8>)>);

impl Run {
    fn new(preset: &'static Preset, settings: &[(&'static str, Value)]) -> Self {
        let lengths = vec![1, 0, 7, 300, 16, if is_brief() { 1_501 } else { 70_001 }, 33];
        Self { preset, settings: settings.to_vec(), lengths, threads: 1, isa: Isa::detect(), chunk: 1 << 15, steps: 4 }
    }

    fn optimizer(&self, dtype: Dtype) -> Optimizer {
        let options = Options { threads: Some(self.threads), ..Options::default() };
        let mut optimizer = Optimizer::cpu(self.preset.name, &options).unwrap();
        optimizer.force_cpu(self.isa, self.chunk);
        let split = self.lengths.len() / 2;
        let infos: Vec<_> = self.lengths.iter().enumerate().map(|(i, &n)| info(self.preset, i, n, dtype)).collect();
        optimizer.add_group(&self.settings, infos[..split].to_vec()).unwrap();
        let others = match self.preset.method {
            // All parameters are one vector.
            Method::Closure(_) => self.settings.clone(),
            _ => vec![("lr", Value::Float(0.05))],
        };
        optimizer.add_group(&others, infos[split..].to_vec()).unwrap();
        optimizer
    }

    /// Bits of every parameter and slot after the run; every third gradient is missing in every second step.
    fn outcome(&self, dtype: Dtype) -> Outcome {
        let mut optimizer = self.optimizer(dtype);
        let start: Vec<Vec<f64>> = self.lengths.iter().enumerate().map(|(i, &n)| numbers(i as u64 + 1, n)).collect();
        let gradient = |step: u64, i: usize| numbers(step * 1000 + i as u64 + 77, self.lengths[i]);
        let missing = |step: u64, i: usize| step % 2 == 1 && i % 3 == 2;
        let bits = match dtype {
            Dtype::F32 => {
                let mut p: Vec<Vec<f32>> = start.iter().map(|p| p.iter().map(|&x| x as f32).collect()).collect();
                for step in 0..self.steps {
                    let g: Vec<Vec<f32>> =
                        (0..p.len()).map(|i| gradient(step, i).iter().map(|&x| x as f32).collect()).collect();
                    step_slices(&mut optimizer, &mut p, &g, |i| missing(step, i));
                }
                p.iter().map(|p| p.iter().map(|x| u64::from(x.to_bits())).collect()).collect()
            }
            _ => {
                let mut p = start;
                for step in 0..self.steps {
                    let g: Vec<Vec<f64>> = (0..p.len()).map(|i| gradient(step, i)).collect();
                    step_slices(&mut optimizer, &mut p, &g, |i| missing(step, i));
                }
                p.iter().map(|p| p.iter().map(|x| x.to_bits()).collect()).collect()
            }
        };
        let state = optimizer.state_dict().unwrap().state;
        let bytes = |value: &StateValue| match value {
            StateValue::Array(array) => array.bytes.clone(),
            StateValue::Number(x) => x.to_le_bytes().to_vec(),
            other => format!("{other:?}").into_bytes(),
        };
        let slots = state.into_iter().flat_map(|(i, s)| s.slots.into_iter().map(move |(key, a)| (i, key, bytes(&a))));
        (bits, slots.collect())
    }
}

fn step_slices<F>(optimizer: &mut Optimizer, p: &mut [Vec<F>], g: &[Vec<F>], missing: impl Fn(usize) -> bool)
where
    F: roptim::real::Real,
{
    let mut params: Vec<TensorMut<'_>> = p.iter_mut().map(|p| p.as_mut_slice().into()).collect();
    let preset = optimizer.preset();
    let gradients: Vec<Option<TensorRef<'_>>> =
        g.iter().enumerate().map(|(i, g)| (!missing(i)).then(|| gradient(preset, g))).collect();
    step(optimizer, &mut params, &gradients);
}

/// One step; of a method that takes a closure, of a loss that falls by 1 from evaluation to evaluation.
fn step(optimizer: &mut Optimizer, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) {
    if !optimizer.preset().needs_closure() {
        return optimizer.step(params, gradients).unwrap();
    }
    optimizer.begin(params).unwrap();
    let mut loss = 0.0;
    while optimizer.tell(loss, params, gradients).unwrap() == Ask::Evaluate {
        loss -= 1.0;
    }
}

fn every(mut law: impl FnMut(&'static Preset, &[(&'static str, Value)])) {
    for preset in REGISTRY {
        for settings in settings(preset) {
            law(preset, &settings);
        }
    }
}

#[test]
fn same_bits_for_any_threads_chunks_and_instruction_set() {
    let cuts = [(7, 17), (2, 1000), (1, 1 << 15)];
    let cuts = if is_brief() { &cuts[..1] } else { &cuts };
    every(|preset, settings| {
        for dtype in [Dtype::F32, Dtype::F64] {
            let want = Run::new(preset, settings).outcome(dtype);
            for isa in Isa::ALL {
                for &(threads, chunk) in cuts {
                    let got = Run { threads, chunk, isa, ..Run::new(preset, settings) }.outcome(dtype);
                    assert!(
                        got == want,
                        "{} {settings:?} {dtype} {isa:?} {threads} threads, chunk {chunk}",
                        preset.name
                    );
                }
            }
        }
    });
}

#[test]
fn save_load_step_equals_step() {
    every(|preset, settings| {
        let run = Run::new(preset, settings);
        let lengths = &run.lengths;
        let mut p: Vec<Vec<f32>> =
            lengths.iter().map(|&n| numbers(n as u64, n).iter().map(|&x| x as f32).collect()).collect();
        let g = |step: u64| -> Vec<Vec<f32>> {
            lengths.iter().map(|&n| numbers(step * 31 + n as u64, n).iter().map(|&x| x as f32).collect()).collect()
        };
        let mut first = run.optimizer(Dtype::F32);
        for step in 0..3 {
            step_slices(&mut first, &mut p, &g(step), |i| i == 3);
        }
        let saved = first.state_dict().unwrap();
        let text = serde_json::to_string(&saved).unwrap();
        let read: roptim::StateDict = serde_json::from_str(&text).unwrap();
        assert_eq!(read, saved, "{} {settings:?}: JSON round trip", preset.name);
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let again: roptim::StateDict = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(again, saved, "{} {settings:?}: binary round trip", preset.name);
        let mut second = run.optimizer(Dtype::F32);
        second.load_state_dict(&read).unwrap();
        let mut q = p.clone();
        for step in 3..6 {
            step_slices(&mut first, &mut p, &g(step), |_| false);
            step_slices(&mut second, &mut q, &g(step), |_| false);
        }
        assert_eq!(p, q, "{} {settings:?}", preset.name);
        assert_eq!(first.state_dict().unwrap(), second.state_dict().unwrap());
    });
}

#[test]
fn a_zero_gradient_without_decay_and_momentum_moves_nothing() {
    for preset in REGISTRY {
        let mut optimizer = Optimizer::cpu(preset.name, &Options::default()).unwrap();
        let off = [("weight_decay", Value::Float(0.0)), ("lambd", Value::Float(0.0))];
        let off: Vec<_> = off.into_iter().filter(|(name, _)| preset.hypers().get(name).is_some()).collect();
        optimizer.add_group(&off, vec![info(preset, 1, 40, Dtype::F32)]).unwrap();
        let start: Vec<f32> = numbers(5, 40).iter().map(|&x| x as f32).collect();
        let mut p = vec![start.clone()];
        for _ in 0..3 {
            step_slices(&mut optimizer, &mut p, &[vec![0.0f32; 40]], |_| false);
        }
        assert_eq!(p[0], start, "{}", preset.name);
    }
}

#[test]
fn a_missing_gradient_leaves_parameter_and_state_untouched() {
    // A method that takes a closure keeps its state at the first parameter.
    for preset in REGISTRY.iter().filter(|preset| !preset.needs_closure()) {
        let run = Run::new(preset, &[]);
        let mut optimizer = run.optimizer(Dtype::F64);
        let mut p: Vec<Vec<f64>> = run.lengths.iter().map(|&n| numbers(n as u64, n)).collect();
        let (g, before) = (p.clone(), p.clone());
        step_slices(&mut optimizer, &mut p, &g, |_| true);
        assert_eq!(p, before);
        assert_eq!(optimizer.update_count(), 0);
        step_slices(&mut optimizer, &mut p, &g, |i| i != 3);
        let state = optimizer.state_dict().unwrap().state;
        assert!(state.keys().all(|&i| i == 3), "{}: a parameter never updated has no state", preset.name);
        assert_eq!(optimizer.update_count(), 1);
    }
}

#[test]
fn strided_tensors_give_the_bits_of_contiguous_ones() {
    strided_law::<f32>();
    strided_law::<f64>();
}

fn strided_law<F: roptim::real::Real>() {
    every(|preset, settings| {
        let (rows, columns) = (37, 13);
        let (n, size) = (rows * columns, F::DTYPE.size() as isize);
        let info = || vec![ParamInfo { name: None, shape: vec![rows, columns], dtype: F::DTYPE, resident: false }];
        fn takes<'a>(preset: &Preset, g: TensorRef<'a>, rows: usize, columns: usize) -> TensorRef<'a> {
            let required = preset.declaration().sparse == Sparse::Required;
            if required { g.of_rows(Rows::new((0..rows).collect(), columns, rows).unwrap()) } else { g }
        }
        let build = || {
            let mut optimizer = Optimizer::cpu(preset.name, &Options::default()).unwrap();
            optimizer.add_group(settings, info()).unwrap();
            optimizer
        };
        let values = |seed| numbers(seed, n).iter().map(|&x| F::from_f64(x)).collect::<Vec<F>>();
        // Column after column, every second element, rows backwards.
        let place = |i: usize| 2 * ((i % columns) * rows + (rows - 1 - i / columns));
        let scatter = |from: &[F]| {
            let mut out = vec![F::from_f64(f64::NAN); 2 * n];
            (0..n).for_each(|i| out[place(i)] = from[i]);
            out
        };
        let bytes = vec![-2 * size, 2 * size * rows as isize];
        let layout = Arc::new(Strides { shape: vec![rows, columns], bytes });
        let raw = |array: &mut [F]| RawTensor {
            ptr: array.as_mut_ptr().wrapping_add(2 * (rows - 1)).cast(),
            len: n,
            dtype: F::DTYPE,
            strides: Some(Arc::clone(&layout)),
        };
        let (mut plain, mut strided) = (build(), build());
        let mut p = values(3);
        let mut q = scatter(&p);
        for at in 0..4 {
            let g = values(at + 9);
            let mut h = scatter(&g);
            let gradient = takes(preset, g.as_slice().into(), rows, columns);
            step(&mut plain, &mut [p.as_mut_slice().into()], &[Some(gradient)]);
            // SAFETY: every offset of the layout lies in `q` and `h`, which nothing else touches meanwhile.
            let (tensor, scattered) = unsafe { (TensorMut::from_raw(raw(&mut q)), TensorRef::from_raw(raw(&mut h))) };
            let gradient = if at % 2 == 0 { scattered } else { g.as_slice().into() };
            step(&mut strided, &mut [tensor], &[Some(takes(preset, gradient, rows, columns))]);
        }
        let same = |a: F, b: F| a.to_f64().to_bits() == b.to_f64().to_bits();
        assert!((0..n).all(|i| same(q[place(i)], p[i])), "{} {settings:?}", preset.name);
        assert!((0..n).all(|i| q[place(i) + 1].is_nan()), "{}: a gap was written to", preset.name);
    });
}

#[test]
fn the_last_step_a_count_can_hold_is_refused() {
    let mut adam = Optimizer::cpu("Adam", &Options::default()).unwrap();
    adam.add_group(&[], vec![ParamInfo::vector("w", 1, Dtype::F32)]).unwrap();
    adam.set_step(0, u64::MAX);
    let (mut p, g) = ([1.0f32], [1.0f32]);
    let error = adam.step(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Adam.step: step of parameter \"w\" must be below 2^64 - 1, got 18446744073709551615"
    );
    assert_eq!(p, [1.0]);
}

#[test]
fn range_edges_are_accepted_and_refused_with_the_exact_message() {
    for preset in REGISTRY {
        for hyper in preset.declaration().hypers.iter().filter(|h| !preset.fixed.contains(&h.name)) {
            let (allowed, refused) = edges(hyper.range);
            let mut hypers = preset.hypers();
            for value in refused {
                let error = preset.set(preset.name, &mut hypers, &[(hyper.name, value)]).unwrap_err();
                let blamed = |numbers: &[f64], range: Range| {
                    let i = numbers.iter().position(|&x| !fits_one(range, x)).unwrap();
                    format!("{}: {}[{i}] must be {range}, got {:?}", preset.name, hyper.name, numbers[i])
                };
                let message = match (hyper.range, value) {
                    (Range::PairFrom(low, high), Value::Pair(pair)) => blamed(&pair, Range::From(low, high)),
                    (Range::HalfPair(low), Value::Pair(pair)) => blamed(&pair, Range::AtLeast(low)),
                    (Range::HalfPair(low), Value::HalfPair(b)) => blamed(&[low, b], Range::AtLeast(low)),
                    (Range::Triple, Value::Triple(three)) => blamed(&three, Range::Finite),
                    (Range::Whole(..) | Range::OrNone(Range::Whole(..)), Value::Float(x)) => {
                        format!("{}: {} must be {}, got {x}", preset.name, hyper.name, hyper.range)
                    }
                    _ => format!("{}: {} must be {}, got {value}", preset.name, hyper.name, hyper.range),
                };
                assert_eq!(error.to_string(), message);
                assert_eq!(error.kind(), ErrorKind::Value);
                assert_eq!(hypers, preset.hypers(), "a refused value changes nothing");
            }
            for value in allowed {
                let set = preset.set(preset.name, &mut preset.hypers(), &[(hyper.name, value)]);
                // Nesterov momentum also asks for a momentum.
                assert!(set.is_ok() || hyper.name == "nesterov", "{} {}: {value}", preset.name, hyper.name);
            }
            let other = if matches!(hyper.range, Range::Flag) { Value::Float(1.0) } else { Value::Bool(true) };
            let error = preset.set(preset.name, &mut hypers, &[(hyper.name, other)]).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("{}: {} must be {}, got {other}", preset.name, hyper.name, hyper.range)
            );
            assert_eq!(error.kind(), ErrorKind::Type);
        }
    }
}

/// What the ranges of single numbers say, in other words.
fn fits_one(range: Range, x: f64) -> bool {
    match range {
        Range::From(low, high) => (low..high).contains(&x),
        Range::AtLeast(low) => (low..=f64::MAX).contains(&x),
        Range::Finite => x.is_finite(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut adam = Optimizer::cpu("Adam", &Options::default()).unwrap();
    adam.add_group(&[], vec![ParamInfo::vector("w", 3, Dtype::F32)]).unwrap();
    let (mut p, g) = (vec![1.0f32; 3], vec![1.0f32; 3]);
    let (mut short, wide) = (vec![1.0f32; 2], vec![1.0f64; 3]);
    let message = |r: roptim::Result<()>| r.unwrap_err().to_string();
    assert_eq!(
        message(adam.step(&mut [short.as_mut_slice().into()], &[Some(g.as_slice().into())])),
        "Adam.step: parameter \"w\" must be of 3 elements, got 2"
    );
    assert_eq!(
        message(adam.step(&mut [p.as_mut_slice().into()], &[Some(wide.as_slice().into())])),
        "Adam.step: gradient of parameter \"w\" must be float32, got float64"
    );
    assert_eq!(message(adam.step(&mut [], &[])), "Adam.step: parameters must be 1 arrays, got 0");
    assert_eq!(p, [1.0; 3]);
    assert!(adam.state_dict().unwrap().state.is_empty());
    let sgd = Optimizer::cpu("SGD", &Options::default()).unwrap().state_dict().unwrap();
    assert_eq!(
        message(adam.load_state_dict(&sgd).map(drop)),
        "Adam.load_state_dict: state must be of Adam or AdamW, got of SGD"
    );
    assert_eq!(
        Optimizer::cpu("Adamm", &Options::default()).unwrap_err().to_string(),
        format!(
            "roptim: optimizer must be one of {}, got Adamm",
            REGISTRY.iter().map(|p| p.name).collect::<Vec<_>>().join(", ")
        )
    );
}

#[test]
fn subnormal_state_is_flushed_unless_asked_not_to() {
    for flush in [true, false] {
        let mut adam = Optimizer::cpu("Adam", &Options { flush_subnormals: flush, ..Options::default() }).unwrap();
        adam.add_group(&[], vec![ParamInfo::vector("w", 20, Dtype::F32)]).unwrap();
        let mut p = vec![vec![1.0f32; 20]];
        step_slices(&mut adam, &mut p, &[vec![1e-20f32; 20]], |_| false);
        let state = adam.state_dict().unwrap();
        let v = &state.state[&0].slots["exp_avg_sq"].array().unwrap().bytes;
        assert_eq!(v.iter().all(|&b| b == 0), flush, "1e-20 squared, times 1e-3, is subnormal in float32");
    }
}

#[test]
fn steps_are_counted_beyond_what_a_float32_holds() {
    let mut adam = Optimizer::cpu("Adam", &Options::default()).unwrap();
    adam.add_group(&[], vec![ParamInfo::vector("w", 1, Dtype::F32)]).unwrap();
    let mut p = vec![vec![1.0f32]];
    for edge in [1u64 << 24, 1 << 32, 1 << 53] {
        adam.set_step(0, edge);
        step_slices(&mut adam, &mut p, &[vec![1.0f32]], |_| false);
        assert_eq!(adam.entries()[0].step, edge + 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if is_brief() { 8 } else { 64 }))]
    #[test]
    fn random_lengths_give_the_bits_of_one_thread(
        lengths in prop::collection::vec(0usize..5000, 1..12),
        chunk in 1usize..3000,
        threads in 1usize..5,
        which in 0usize..REGISTRY.len(),
    ) {
        let preset = &REGISTRY[which];
        let base = Run { lengths: lengths.clone(), ..Run::new(preset, &[]) };
        let other = Run { lengths, chunk, threads, ..Run::new(preset, &[]) };
        prop_assert!(base.outcome(Dtype::F32) == other.outcome(Dtype::F32));
    }
}

/// One step of one parameter.
fn one_step(optimizer: &mut Optimizer, p: RawTensor, g: TensorRef<'_>) {
    // SAFETY: the callers' vectors outlive the call and do not overlap.
    step(optimizer, &mut [unsafe { TensorMut::from_raw(p) }], &[Some(g)]);
}

fn raw<T>(array: &mut [T], dtype: Dtype) -> RawTensor {
    let per_item = size_of::<T>() / dtype.size();
    RawTensor { ptr: array.as_mut_ptr().cast(), len: array.len() * per_item, dtype, strides: None }
}

#[test]
fn complex_numbers_are_pairs_of_reals() {
    every(|preset, settings| {
        let real = info(preset, 1, 60, Dtype::F32);
        let complex = ParamInfo { dtype: Dtype::C64, ..info(preset, 1, 30, Dtype::F32) };
        let build = |info: ParamInfo| {
            let mut optimizer = Optimizer::cpu(preset.name, &Options::default()).unwrap();
            optimizer.add_group(settings, vec![info]).map(|_| optimizer)
        };
        let mut pairs = match build(complex) {
            Ok(pairs) => pairs,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Type);
                assert!(error.to_string().ends_with("must be of real numbers, got complex64"), "{error}");
                return;
            }
        };
        let mut reals = build(real).unwrap();
        let values = |seed| numbers(seed, 60).iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let (mut p, mut q) = (values(1), values(1));
        for step in 0..3 {
            let g = values(step + 5);
            one_step(&mut reals, raw(&mut p, Dtype::F32), gradient(preset, &g));
            one_step(&mut pairs, raw(&mut q, Dtype::F32), gradient(preset, &g));
        }
        assert_eq!(p, q, "{} {settings:?}", preset.name);
        for (key, value) in &pairs.state_dict().unwrap().state.get(&0).cloned().unwrap_or_default().slots {
            let other = &reals.state_dict().unwrap().state[&0].slots[key];
            if preset.needs_closure() {
                assert_eq!(other, value, "{} {key}: one vector of reals", preset.name);
            } else if let Some(array) = value.array() {
                assert_eq!((array.dtype, array.shape.as_slice()), (Dtype::C64, &[30][..]), "{} {key}", preset.name);
                assert_eq!(other.array().unwrap().bytes, array.bytes);
            }
        }
    });
}

#[test]
fn half_precision_is_stored_narrow_and_computed_wide() {
    fn law<H>(dtype: Dtype, narrow: fn(f32) -> H, widen: fn(H) -> f32)
    where
        H: Copy + PartialEq + std::fmt::Debug,
    {
        every(|preset, settings| {
            let build = |dtype| {
                let mut optimizer = Optimizer::cpu(preset.name, &Options::default()).unwrap();
                optimizer.add_group(settings, vec![info(preset, 1, 600, dtype)]).unwrap();
                optimizer
            };
            if preset.name == "Adafactor" {
                // Its ε₁ follows the parameter's own dtype.
                return;
            }
            let values = |seed| numbers(seed, 600).iter().map(|&x| narrow(x as f32)).collect::<Vec<H>>();
            let wide = |x: &[H]| x.iter().map(|&x| widen(x)).collect::<Vec<f32>>();
            let (mut single, mut own, mut mixed) = (build(Dtype::F32), build(dtype), build(dtype));
            let (mut p, mut q) = (values(1), values(1));
            for step in 0..3 {
                let mut g = values(step + 5);
                let g32 = wide(&g);
                let mut want = wide(&p);
                one_step(&mut single, raw(&mut want, Dtype::F32), taken(preset, 600, g32.as_slice().into()));
                // SAFETY: `g` outlives the call.
                let narrow_gradient = unsafe { TensorRef::from_raw(raw(&mut g, dtype)) };
                one_step(&mut own, raw(&mut p, dtype), taken(preset, 600, narrow_gradient));
                one_step(&mut mixed, raw(&mut q, dtype), taken(preset, 600, g32.as_slice().into()));
                let want: Vec<H> = want.iter().map(|&x| narrow(x)).collect();
                assert!(p == want && q == want, "{} {settings:?} {dtype}", preset.name);
            }
            let (a, b) = (own.state_dict().unwrap().state, single.state_dict().unwrap().state);
            assert_eq!(a, b, "{}: state is kept in float32", preset.name);
        });
    }
    law(Dtype::F16, half::f16::from_f32, half::f16::to_f32);
    law(Dtype::BF16, half::bf16::from_f32, half::bf16::to_f32);
}

#[test]
fn a_sparse_gradient_is_a_dense_one_with_zeros() {
    let momentum: &[(&str, Value)] = &[("momentum", Value::Float(0.9))];
    let start: &[(&str, Value)] = &[("initial_accumulator_value", Value::Float(0.5))];
    let plain = REGISTRY.iter().filter(|p| p.declaration().sparse == Sparse::Accepted).map(|p| (p.name, &[][..]));
    for (name, settings) in plain.chain([("SGD", momentum), ("Adagrad", start)]) {
        let (rows, width) = (40, 7);
        let build = || {
            let mut optimizer = Optimizer::cpu(name, &Options { threads: Some(2), ..Options::default() }).unwrap();
            let table = ParamInfo { name: None, shape: vec![rows, width], dtype: Dtype::F64, resident: false };
            optimizer.add_group(settings, vec![table]).unwrap();
            optimizer.force_cpu(Isa::detect(), 10);
            optimizer
        };
        let (mut dense, mut sparse) = (build(), build());
        let (mut p, mut q) = (numbers(3, rows * width), numbers(3, rows * width));
        for (at, touched) in [vec![0, 5, 6, 39], vec![], vec![5, 7], (0..rows).collect()].into_iter().enumerate() {
            let values = numbers(at as u64 + 50, touched.len() * width);
            let mut g = vec![0.0; rows * width];
            for (row, value) in touched.iter().zip(values.chunks(width)) {
                g[row * width..][..width].copy_from_slice(value);
            }
            step(&mut dense, &mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())]);
            let rows = Rows::new(touched, width, rows).unwrap();
            let values = TensorRef::from(values.as_slice()).of_rows(rows);
            step(&mut sparse, &mut [q.as_mut_slice().into()], &[Some(values)]);
            assert_eq!(p, q, "{name} {settings:?} step {at}");
            assert_eq!(dense.state_dict().unwrap(), sparse.state_dict().unwrap());
        }
    }
}

#[test]
fn rows_without_a_gradient_rest_in_sparse_adam() {
    let mut adam = Optimizer::cpu("SparseAdam", &Options::default()).unwrap();
    let table = ParamInfo { name: None, shape: vec![4, 3], dtype: Dtype::F32, resident: false };
    adam.add_group(&[], vec![table]).unwrap();
    let mut p = vec![1.0f32; 12];
    let g = [0.5f32, -1.0, 2.0];
    let step = |adam: &mut Optimizer, p: &mut Vec<f32>, rows: Vec<usize>, g: &[f32]| {
        let rows = Rows::new(rows, 3, 4).unwrap();
        adam.step(&mut [p.as_mut_slice().into()], &[Some(TensorRef::from(g).of_rows(rows))])
    };
    step(&mut adam, &mut p, vec![2], &g).unwrap();
    assert!((0..12).all(|i| (p[i] == 1.0) == (i / 3 != 2)), "{p:?}");
    let before = p.clone();
    step(&mut adam, &mut p, vec![], &[]).unwrap();
    assert_eq!(p, before);
    assert_eq!(adam.entries()[0].step, 2, "an empty gradient counts");
    let refused = |r: roptim::Result<()>| r.unwrap_err().to_string();
    assert_eq!(
        refused(adam.step(&mut [p.as_mut_slice().into()], &[Some([0.0f32; 12].as_slice().into())])),
        "SparseAdam.step: gradient of parameter 0 must be sparse, got a dense one; use Adam for dense gradients"
    );
    assert_eq!(
        refused(step(&mut adam, &mut p, vec![1], &g[..2])),
        "SparseAdam.step: gradient of parameter 0 must be of 3 elements, got 2"
    );
    assert!(Rows::new(vec![1, 1], 3, 4).is_none() && Rows::new(vec![4], 3, 4).is_none());
    assert_eq!(p, before);
}
