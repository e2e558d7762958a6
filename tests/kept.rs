//! What an optimizer keeps from step to step does not show, and a step that clears its gradients is the same step.

#[path = "common/numbers.rs"]
mod numbers;

use roptim::real::Real;
use roptim::rule::Sparse;
use roptim::tensor::Rows;
use roptim::{
    Besides, Dtype, ErrorKind, Guard, Nonfinite, Optimizer, Options, ParamInfo, Preset, REGISTRY, TensorMut, TensorRef,
    Value,
};

use numbers::numbers;

/// Matrices, which every optimizer takes; the last is worth several threads.
const SHAPES: [[usize; 2]; 5] = [[5, 3], [1, 7], [4, 4], [2, 1], [4, 8201]];

fn arrays(seed: u64) -> Vec<Vec<f32>> {
    SHAPES.iter().enumerate().map(|(i, [rows, columns])| numbers(seed + i as u64, rows * columns)).collect()
}

/// The optimizers that are given gradients, dense ones too.
fn dense() -> impl Iterator<Item = &'static Preset> {
    REGISTRY.iter().filter(|preset| !preset.needs_closure() && preset.declaration().sparse != Sparse::Required)
}

/// An optimizer over two groups of these shapes.
fn optimizer(preset: &Preset, options: &Options) -> Optimizer {
    let mut optimizer = Optimizer::cpu(preset.name, options).unwrap();
    let info = |(i, shape): (usize, &[usize; 2])| ParamInfo {
        name: Some(format!("p{i}")),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
        resident: false,
    };
    let infos: Vec<_> = SHAPES.iter().enumerate().map(info).collect();
    optimizer.add_group(&[], infos[..2].to_vec()).unwrap();
    optimizer.add_group(&[("lr", Value::Float(0.03))], infos[2..].to_vec()).unwrap();
    optimizer
}

fn writable<F: Real>(arrays: &mut [Vec<F>]) -> Vec<TensorMut<'_>> {
    arrays.iter_mut().map(|a| a.as_mut_slice().into()).collect()
}

fn step(optimizer: &mut Optimizer, p: &mut [Vec<f32>], g: &[Vec<f32>], is_present: impl Fn(usize) -> bool) {
    let needs_rows = optimizer.preset().declaration().sparse == Sparse::Required;
    let gradients = g.iter().enumerate().map(|(i, g)| {
        let all = TensorRef::from(g.as_slice());
        let rows = || Rows::new((0..g.len()).collect(), 1, g.len()).unwrap();
        is_present(i).then(|| if needs_rows { all.of_rows(rows()) } else { all })
    });
    let gradients: Vec<_> = gradients.collect();
    optimizer.step(&mut writable(p), &gradients).unwrap();
}

fn bits(arrays: &[Vec<f32>]) -> Vec<Vec<u32>> {
    arrays.iter().map(|a| a.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn gradients_that_come_and_go_are_those_of_an_optimizer_made_for_the_step() {
    for preset in REGISTRY.iter().filter(|preset| !preset.needs_closure()) {
        let options = Options { threads: Some(2), ..Options::default() };
        let mut kept = optimizer(preset, &options);
        let (mut p, g) = (arrays(1), arrays(100));
        for pattern in [31u32, 31, 21, 10, 31, 0, 31, 16, 16, 1, 31, 30, 31, 31] {
            let is_present = |i: usize| pattern >> i & 1 == 1;
            let mut made = optimizer(preset, &options);
            made.load_state_dict(&kept.state_dict().unwrap()).unwrap();
            let mut q = p.clone();
            step(&mut made, &mut q, &g.clone(), is_present);
            step(&mut kept, &mut p, &g, is_present);
            assert_eq!(bits(&p), bits(&q), "{} {pattern:b}", preset.name);
            assert_eq!(kept.state_dict().unwrap(), made.state_dict().unwrap(), "{} {pattern:b}", preset.name);
        }
    }
}

#[test]
fn hyperparameters_that_change_are_those_of_an_optimizer_made_for_the_step() {
    for preset in REGISTRY.iter().filter(|preset| !preset.needs_closure()) {
        let mut kept = optimizer(preset, &Options::default());
        let (mut p, g) = (arrays(2), arrays(200));
        let flag = |name, x| (name, Value::Bool(x));
        let number = |name, x| (name, Value::Float(x));
        let changes = [
            flag("maximize", true),
            number("momentum", 0.9),
            flag("amsgrad", true),
            flag("nesterov", true),
            flag("centered", true),
            number("weight_decay", 0.25),
            flag("maximize", false),
            flag("nesterov", false),
            number("momentum", 0.0),
            number("lr", 0.03),
            number("lr", 0.001),
            flag("amsgrad", false),
            flag("centered", false),
            number("weight_decay", 0.0),
        ];
        for (at, change) in changes.into_iter().enumerate() {
            // What an optimizer lacks or refuses changes nothing.
            let group = at % 3 % 2;
            let _ = kept.set_hypers(group, &[change]);
            let mut made = optimizer(preset, &Options::default());
            made.load_state_dict(&kept.state_dict().unwrap()).unwrap();
            let mut q = p.clone();
            step(&mut made, &mut q, &g.clone(), |_| true);
            step(&mut kept, &mut p, &g, |_| true);
            assert_eq!(bits(&p), bits(&q), "{} group {group} {change:?}", preset.name);
        }
    }
}

#[test]
fn a_step_that_clears_is_the_step_that_does_not() {
    let guards = [Guard::default(), Guard { clip_norm: Some(0.5), clip_value: Some(0.75), ..Guard::default() }];
    for preset in dense() {
        for (guard, threads) in [(guards[0], 1), (guards[0], 3), (guards[1], 2)] {
            let options = Options { threads: Some(threads), guard, ..Options::default() };
            let (mut one, mut two) = (optimizer(preset, &options), optimizer(preset, &options));
            let (mut p, mut q) = (arrays(3), arrays(3));
            let mut g = arrays(300);
            for at in 0..4 {
                let is_present = |i: usize| at != 2 || i != 1;
                step(&mut one, &mut p, &g, is_present);
                let before = bits(&g);
                let gradients = g.iter_mut().map(|g| Some(g.as_mut_slice().into()));
                let mut gradients: Vec<Option<TensorMut<'_>>> =
                    gradients.enumerate().map(|(i, g)| g.filter(|_| is_present(i))).collect();
                two.step_and_clear(&mut writable(&mut q), &mut gradients).unwrap();
                assert_eq!(bits(&p), bits(&q), "{} {guard:?} {threads} threads", preset.name);
                assert_eq!(one.state_dict().unwrap(), two.state_dict().unwrap());
                for (i, (g, before)) in bits(&g).into_iter().zip(before).enumerate() {
                    let want = if is_present(i) { vec![0; g.len()] } else { before };
                    assert!(g == want, "{}: gradient {i} in step {at}", preset.name);
                }
                g = arrays(301 + at);
            }
        }
    }
}

#[test]
fn gradients_stay_where_a_step_is_refused_and_are_cleared_where_it_is_left_out() {
    for preset in dense() {
        for nonfinite in [Nonfinite::Raise, Nonfinite::Skip] {
            let options =
                Options { guard: Guard { nonfinite, ..Guard::default() }, threads: Some(2), ..Options::default() };
            let mut optimizer = optimizer(preset, &options);
            let (mut p, mut g) = (arrays(4), arrays(400));
            g[3][1] = f32::NAN;
            let (p_before, g_before) = (bits(&p), bits(&g));
            let mut gradients: Vec<_> = g.iter_mut().map(|g| Some(TensorMut::from(g.as_mut_slice()))).collect();
            let outcome = optimizer.step_and_clear(&mut writable(&mut p), &mut gradients);
            assert_eq!(bits(&p), p_before);
            if nonfinite == Nonfinite::Raise {
                assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Nonfinite);
                assert_eq!(bits(&g), g_before, "{}", preset.name);
                // A refused step leaves no wish to clear behind.
                g[3][1] = 0.5;
                let g_before = bits(&g);
                step(&mut optimizer, &mut p, &g, |_| true);
                assert_eq!(bits(&g), g_before, "{}", preset.name);
            } else {
                outcome.unwrap();
                assert_eq!(optimizer.skip_count(), 1);
                assert!(g.iter().flatten().all(|x| x.to_bits() == 0), "{}", preset.name);
            }
            let too_few = optimizer.step_and_clear(&mut writable(&mut p), &mut []);
            assert_eq!(too_few.unwrap_err().kind(), ErrorKind::Value);
        }
    }
}

/// The norm of all gradients and the parameters after a step that it bounds.
fn bounded<F: Real>(dtype: Dtype, lengths: &[usize], threads: usize) -> (u64, Vec<u64>) {
    let guard = Guard { clip_norm: Some(0.5), ..Guard::default() };
    let mut sgd = Optimizer::cpu("SGD", &Options { threads: Some(threads), guard, ..Options::default() }).unwrap();
    let info = |(i, &n): (usize, &usize)| ParamInfo::vector(&format!("p{i}"), n, dtype);
    sgd.add_group(&[("lr", Value::Float(0.1))], lengths.iter().enumerate().map(info).collect()).unwrap();
    let of = |seed: usize, n: usize| numbers(seed as u64, n).iter().map(|&x| F::from_f64(x.into())).collect();
    let mut p: Vec<Vec<F>> = lengths.iter().enumerate().map(|(i, &n)| of(i + 1, n)).collect();
    let g: Vec<Vec<F>> = lengths.iter().enumerate().map(|(i, &n)| of(i + 501, n)).collect();
    let gradients: Vec<_> = g.iter().map(|g| Some(TensorRef::from(g.as_slice()))).collect();
    sgd.step(&mut writable(&mut p), &gradients).unwrap();
    let norm = sgd.gradient_norm().unwrap().unwrap();
    let sum: f64 = g.iter().flatten().map(|x| x.to_f64() * x.to_f64()).sum();
    assert!((norm - sum.sqrt()).abs() <= 1e-12 * norm, "{norm} {sum}");
    (norm.to_bits(), p.iter().flatten().map(|x| x.to_f64().to_bits()).collect())
}

#[test]
fn norms_have_the_same_bits_for_any_number_of_threads() {
    let many: Vec<usize> = (0..1500).map(|i| i * 37 % 101).collect();
    let odd = [0, 0, 1, 1023, 0, 4095, 4096, 4097, 0, 32_767, 0, 65_537, 3, 8193, 0, 0].to_vec();
    let edges: Vec<usize> = [0, 1].into_iter().chain([1024; 40]).chain([0, 2049, 0]).collect();
    for lengths in [many, odd, edges, vec![0, 0, 0, 70_001], vec![70_001, 0, 0], vec![0, 0]] {
        for dtype in [Dtype::F32, Dtype::F64] {
            let outcome = |threads| match dtype {
                Dtype::F64 => bounded::<f64>(dtype, &lengths, threads),
                _ => bounded::<f32>(dtype, &lengths, threads),
            };
            let want = outcome(1);
            for threads in [2, 3, 8] {
                assert!(outcome(threads) == want, "{threads} threads, {} arrays of {dtype}", lengths.len());
            }
        }
    }
}

/// A scale that is divided out leaves no trace, and what is none changes nothing.
#[test]
fn scales_are_powers_of_two() {
    let edges = [2f64.powi(-126), 0.5, 1.0, 2.0, 2f64.powi(126)];
    let refused = [0.0, -2.0, 3.0, 2f64.powi(-127), 2f64.powi(127), 5e-324, f64::INFINITY, f64::NAN];
    for scale in edges {
        let outcome = |scale: f64| {
            let guard = Guard { clip_norm: Some(0.5), clip_value: Some(0.25), ..Guard::default() };
            let options = Options { guard, ..Options::default() };
            let mut sgd = Optimizer::cpu("SGD", &options).unwrap();
            sgd.add_group(&[("lr", Value::Float(0.1))], vec![ParamInfo::vector("w", 9, Dtype::F64)]).unwrap();
            sgd.set_grad_scale(scale).unwrap();
            for scale in refused {
                assert_eq!(sgd.set_grad_scale(scale).unwrap_err().kind(), ErrorKind::Value, "{scale}");
            }
            assert_eq!(sgd.grad_scale(), scale);
            let mut p = [1.0f64; 9];
            let g: Vec<f64> = numbers(5, 9).iter().map(|&x| f64::from(x) * scale).collect();
            let besides = Besides { average: None, measures: true };
            sgd.step_with(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())], besides).unwrap();
            let squares = sgd.squares()[0].unwrap();
            (p.map(f64::to_bits), sgd.gradient_norm().unwrap().map(f64::to_bits), squares.gradient.to_bits())
        };
        assert!(outcome(scale) == outcome(1.0), "{scale}");
    }
}

#[test]
fn an_average_that_follows_has_the_bits_of_one_that_comes_after() {
    for preset in dense() {
        for decay in [Value::None, Value::Float(0.9)] {
            let options = Options::default();
            let mut both = [optimizer(preset, &options), optimizer(preset, &options)];
            let mut averages = both.each_ref().map(|_| {
                let mut average = Optimizer::cpu("AveragedModel", &options).unwrap();
                let infos = SHAPES.map(|shape| ParamInfo::vector("w", shape.iter().product(), Dtype::F32)).into();
                average.add_group(&[("decay", decay)], infos).unwrap();
                average
            });
            let mut values = [arrays(1), arrays(1)];
            let mut averaged = [arrays(1), arrays(1)];
            for at in 0..6usize {
                let g = arrays(100 + at as u64);
                let is_present = |i: usize| at < 2 || !(i + at).is_multiple_of(3);
                let gradients: Vec<Option<TensorRef<'_>>> =
                    g.iter().enumerate().map(|(i, g)| is_present(i).then(|| g.as_slice().into())).collect();
                let [one, two] = &mut both;
                let [follower, later] = &mut averages;
                let before = values[0].clone();
                let besides = Besides { average: Some((follower, &mut writable(&mut averaged[0]))), measures: true };
                one.step_with(&mut writable(&mut values[0]), &gradients, besides).unwrap();
                two.step(&mut writable(&mut values[1]), &gradients).unwrap();
                let now: Vec<Option<TensorRef<'_>>> = values[1].iter().map(|p| Some(p.as_slice().into())).collect();
                later.step(&mut writable(&mut averaged[1]), &now).unwrap();
                assert_eq!(values[0], values[1], "{} step {at}", preset.name);
                assert_eq!(averaged[0], averaged[1], "{} step {at}", preset.name);
                assert_eq!(one.squares().len(), SHAPES.len());
                assert!(two.squares().is_empty());
                for (i, squares) in one.squares().iter().enumerate() {
                    let Some(squares) = squares else {
                        assert!(!is_present(i));
                        continue;
                    };
                    let sum = |terms: &mut dyn Iterator<Item = f64>| terms.map(|x| x * x).sum::<f64>();
                    let wide = |x: &f32| f64::from(*x);
                    let want = [
                        (squares.gradient, sum(&mut g[i].iter().map(wide))),
                        (squares.parameter, sum(&mut values[0][i].iter().map(wide))),
                        (squares.update, sum(&mut values[0][i].iter().zip(&before[i]).map(|(a, b)| wide(a) - wide(b)))),
                    ];
                    for (got, want) in want {
                        assert!((got - want).abs() <= 1e-12 * want, "{}: {got} in place of {want}", preset.name);
                    }
                }
            }
            let [follower, later] = &averages;
            assert!(follower.entries().iter().zip(later.entries()).all(|(a, b)| (a.step, b.step) == (6, 6)));
        }
    }
}

#[test]
fn an_average_that_does_not_fit_changes_nothing() {
    let options = Options::default();
    let mut sgd = Optimizer::cpu("SGD", &options).unwrap();
    sgd.add_group(&[], vec![ParamInfo::vector("w", 3, Dtype::F32)]).unwrap();
    let mut average = Optimizer::cpu("AveragedModel", &options).unwrap();
    average.add_group(&[], vec![ParamInfo::vector("w", 4, Dtype::F32)]).unwrap();
    let (mut p, mut a, g) = (vec![1.0f32; 3], vec![0.0f32; 4], [1.0f32; 3]);
    let besides = Besides { average: Some((&mut average, &mut [a.as_mut_slice().into()])), measures: false };
    let error = sgd.step_with(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())], besides).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Value);
    assert_eq!((p, a, sgd.update_count(), average.update_count()), (vec![1.0; 3], vec![0.0; 4], 0, 0));
}
