//! Laws that hold for every optimizer of the registry, on the CPU.

use proptest::prelude::*;
use roptim::cpu::Isa;
use roptim::hyper::Range;
use roptim::tensor::{RawTensor, Strides};
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

/// Settings that turn each switch and number of a preset away from its default, one at a time and
/// together where the rule allows it.
fn settings(preset: &Preset) -> Vec<Vec<(&'static str, Value)>> {
    let mut all = vec![vec![]];
    for hyper in preset.declaration().hypers.iter().filter(|h| !preset.fixed.contains(&h.name)) {
        let value = match hyper.range {
            Range::Flag => Value::Bool(true),
            Range::AtLeast(low) => Value::Float(low + 0.1),
            Range::Finite => Value::Float(0.3),
            Range::From(low, high) | Range::Within(low, high) => Value::Float(low + 0.8 * (high - low)),
            Range::PairFrom(low, high) => Value::Pair([low + 0.4 * (high - low), low + 0.97 * (high - low)]),
        };
        let one = vec![(hyper.name, value)];
        let mut hypers = preset.hypers();
        if preset.set("test", &mut hypers, &one).is_ok() {
            all.push(one);
        }
    }
    if preset.hypers().get("momentum").is_some() {
        let momentum = ("momentum", Value::Float(0.9));
        all.push(vec![momentum]);
        all.push(vec![momentum, ("nesterov", Value::Bool(true)), ("weight_decay", Value::Float(0.1))]);
        all.push(vec![momentum, ("dampening", Value::Float(0.5)), ("maximize", Value::Bool(true))]);
    }
    if preset.hypers().get("amsgrad").is_some() {
        all.push(vec![
            ("amsgrad", Value::Bool(true)),
            ("weight_decay", Value::Float(0.1)),
            ("maximize", Value::Bool(true)),
        ]);
    }
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
        let lengths = vec![1, 0, 7, 300, 16, 70_001, 33];
        Self { preset, settings: settings.to_vec(), lengths, threads: 1, isa: Isa::detect(), chunk: 1 << 15, steps: 4 }
    }

    fn optimizer(&self, dtype: Dtype) -> Optimizer {
        let options = Options { threads: Some(self.threads), ..Options::default() };
        let mut optimizer = Optimizer::cpu(self.preset.name, &options).unwrap();
        optimizer.force_cpu(self.isa, self.chunk);
        let split = self.lengths.len() / 2;
        let infos: Vec<_> =
            self.lengths.iter().enumerate().map(|(i, &n)| ParamInfo::vector(&i.to_string(), n, dtype)).collect();
        optimizer.add_group(&self.settings, infos[..split].to_vec()).unwrap();
        optimizer.add_group(&[("lr", Value::Float(0.05))], infos[split..].to_vec()).unwrap();
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
            Dtype::F64 => {
                let mut p = start;
                for step in 0..self.steps {
                    let g: Vec<Vec<f64>> = (0..p.len()).map(|i| gradient(step, i)).collect();
                    step_slices(&mut optimizer, &mut p, &g, |i| missing(step, i));
                }
                p.iter().map(|p| p.iter().map(|x| x.to_bits()).collect()).collect()
            }
        };
        let state = optimizer.state_dict().unwrap().state;
        let slots = state.into_iter().flat_map(|(i, s)| s.slots.into_iter().map(move |(key, a)| (i, key, a.bytes)));
        (bits, slots.collect())
    }
}

fn step_slices<F>(optimizer: &mut Optimizer, p: &mut [Vec<F>], g: &[Vec<F>], missing: impl Fn(usize) -> bool)
where
    F: roptim::real::Real,
{
    let mut params: Vec<TensorMut<'_>> = p.iter_mut().map(|p| p.as_mut_slice().into()).collect();
    let gradients: Vec<Option<TensorRef<'_>>> =
        g.iter().enumerate().map(|(i, g)| (!missing(i)).then(|| g.as_slice().into())).collect();
    optimizer.step(&mut params, &gradients).unwrap();
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
    every(|preset, settings| {
        for dtype in [Dtype::F32, Dtype::F64] {
            let want = Run::new(preset, settings).outcome(dtype);
            for isa in Isa::ALL {
                for (threads, chunk) in [(1, 1 << 15), (2, 1000), (7, 17)] {
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
        let off = [("weight_decay", Value::Float(0.0))];
        optimizer.add_group(&off, vec![ParamInfo::vector("p", 40, Dtype::F32)]).unwrap();
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
    for preset in REGISTRY {
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
        for step in 0..4 {
            let g = values(step + 9);
            let mut h = scatter(&g);
            plain.step(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())]).unwrap();
            // SAFETY: every offset of the layout lies in `q` and `h`, which nothing else touches meanwhile.
            let (tensor, scattered) = unsafe { (TensorMut::from_raw(raw(&mut q)), TensorRef::from_raw(raw(&mut h))) };
            let gradient = if step % 2 == 0 { scattered } else { g.as_slice().into() };
            strided.step(&mut [tensor], &[Some(gradient)]).unwrap();
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
            let refused: Vec<Value> = match hyper.range {
                Range::AtLeast(low) => {
                    vec![low - f64::EPSILON, f64::INFINITY, f64::NAN].into_iter().map(Value::Float).collect()
                }
                Range::Finite => {
                    vec![f64::INFINITY, f64::NEG_INFINITY, f64::NAN].into_iter().map(Value::Float).collect()
                }
                Range::From(low, high) => vec![low - 1e-9, high, f64::NAN].into_iter().map(Value::Float).collect(),
                Range::Within(low, high) => {
                    vec![low - 1e-9, high + 1e-9, f64::NAN].into_iter().map(Value::Float).collect()
                }
                Range::PairFrom(low, high) => {
                    vec![[low - 1e-9, low], [low, high], [f64::NAN, low]].into_iter().map(Value::Pair).collect()
                }
                Range::Flag => vec![],
            };
            let mut hypers = preset.hypers();
            for value in refused {
                let error = preset.set(preset.name, &mut hypers, &[(hyper.name, value)]).unwrap_err();
                let message = match (hyper.range, value) {
                    (Range::PairFrom(low, high), Value::Pair(pair)) => {
                        let i = usize::from(low <= pair[0] && pair[0] < high);
                        let range = Range::From(low, high);
                        format!("{}: {}[{i}] must be {range}, got {:?}", preset.name, hyper.name, pair[i])
                    }
                    _ => format!("{}: {} must be {}, got {value}", preset.name, hyper.name, hyper.range),
                };
                assert_eq!(error.to_string(), message);
                assert_eq!(error.kind(), ErrorKind::Value);
                assert_eq!(hypers, preset.hypers(), "a refused value changes nothing");
            }
            let lowest = match hyper.range {
                Range::AtLeast(low) | Range::From(low, _) | Range::Within(low, _) => Value::Float(low),
                Range::PairFrom(low, _) => Value::Pair([low, low]),
                Range::Finite => Value::Float(f64::MIN),
                Range::Flag => Value::Bool(false),
            };
            assert!(preset.set(preset.name, &mut preset.hypers(), &[(hyper.name, lowest)]).is_ok(), "{}", hyper.name);
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
    assert_eq!(message(adam.load_state_dict(&sgd)), "Adam.load_state_dict: state must be of Adam, got of SGD");
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
        let v = &state.state[&0].slots["exp_avg_sq"].bytes;
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
    #![proptest_config(ProptestConfig::with_cases(64))]
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
