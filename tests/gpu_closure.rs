//! LBFGS and conjugate gradients, CPU against GPU, and the vectors of both.
//!
//! Elementwise operations have the CPU's bits on a software adapter. Sums differ from the CPU's in the last of their
//! about 48 bits, which the rounding of a step length to f32 mostly hides.
//!
//! Without an adapter the tests print a line and pass; `ROPTIM_REQUIRE_GPU=1` makes them fail.

#![cfg(feature = "gpu")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use roptim::closure::Ask;
use roptim::closure::vector::{HostVector, Reduction, Vector};
use roptim::gpu::{DeviceRequest, DeviceVector, VectorSpace};
use roptim::hyper::Choice;
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, StateDict, TensorMut, TensorRef, Value};

/// Largest relative difference of a sum from the one in f64, against Σ|xᵢ·yᵢ|.
const SUM_TOLERANCE: f64 = 1e-13;

/// Largest difference of an element of the first step's points on a software adapter, all below 3. Mesa's llvmpipe has
/// none; an ulp or two is what another order of a sum's terms may cost.
const POINT_TOLERANCE: f64 = 1e-6;

/// Elements of a block of a sum, and of the smallest window.
const BLOCK: usize = 4096;

fn request() -> DeviceRequest {
    DeviceRequest { allow_software: true, ..DeviceRequest::default() }
}

fn space() -> Option<VectorSpace> {
    match VectorSpace::new("LBFGS", &request()) {
        Ok(space) => Some(space),
        Err(e) if e.kind() == ErrorKind::NoAdapter => {
            assert!(std::env::var("ROPTIM_REQUIRE_GPU").as_deref() != Ok("1"), "{e}");
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Numbers in [−1, 1).
fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// Numbers of all magnitudes up to 10^±`decades`, some of them zero.
fn hostile(seed: u64, len: usize, decades: f64) -> Vec<f32> {
    let mut draw = random(seed);
    let mut one = |i: usize| {
        let (sign, size) = (draw(), draw());
        if i % 17 == 5 { 0.0 } else { (sign.signum() * 10f64.powf(decades * size)) as f32 }
    };
    (0..len).map(&mut one).collect()
}

const LENGTHS: [usize; 9] = [0, 1, 2, 63, 4095, 4096, 4097, 8192, 100_003];

#[test]
fn reductions_are_those_of_the_cpu_at_any_magnitude() {
    let Some(mut space) = space() else { return };
    let mut worst = 0.0f64;
    for (window, decades) in [(usize::MAX / 2, 0.0), (BLOCK, 4.0), (3 * BLOCK, 18.0), (1 << 20, 38.0)] {
        space.force(window);
        let home = space.home();
        for (k, len) in LENGTHS.into_iter().enumerate() {
            let [x, y] = [1, 2].map(|seed| hostile(10 * k as u64 + seed, len, decades));
            let [cpu_x, cpu_y] = [&x, &y].map(|x| HostVector::from(&x[..]));
            let [gpu_x, gpu_y] = [&x, &y].map(|x| DeviceVector::new(&home, x).unwrap());
            assert_eq!(*gpu_x.to_host().unwrap(), *x, "there and back");
            let third = len / 3;
            let got = DeviceVector::reduce([
                Reduction::Dot(&gpu_x, &gpu_y),
                Reduction::SumAbs(&gpu_x),
                gpu_x.whole(),
                Reduction::Largest(&gpu_x, third..2 * third),
            ]);
            DeviceVector::outcome(&home).unwrap();
            assert_eq!(got[2..], [cpu_x.largest(), cpu_x.largest_of(third..2 * third)]);
            let [want_dot, want_sum] = HostVector::reduce([Reduction::Dot(&cpu_x, &cpu_y), Reduction::SumAbs(&cpu_x)]);
            let scale: f64 = x.iter().zip(&y).map(|(&x, &y)| (f64::from(x) * f64::from(y)).abs()).sum();
            for (got, want, scale) in [(got[0], want_dot, scale), (got[1], want_sum, want_sum)] {
                let error = if got == want { 0.0 } else { (got - want).abs() / scale };
                worst = worst.max(error);
                assert!(error <= SUM_TOLERANCE, "{len} elements, {decades}: {got:e}, want {want:e}: {error:e}");
            }
        }
    }
    eprintln!("sums differ by at most {worst:.1e}");
}

#[test]
fn products_of_opposite_magnitudes_count() {
    let Some(space) = space() else { return };
    let home = space.home();
    for (x, y) in [
        (vec![1e30f32, 1e-30], vec![1e-30f32, 1e30]),
        (vec![1e19, 1e19], vec![1e19, 1e19]),
        (vec![1e-30, 3e-30], vec![1e-30, 2e-30]),
        (vec![f32::from_bits(3), f32::MIN_POSITIVE / 2.0], vec![1.0, f32::from_bits(1)]),
        (vec![f32::from_bits(1); 2], vec![f32::from_bits(7); 2]),
        (vec![f32::MAX; 5000], vec![f32::MAX; 5000]),
        (vec![-0.0, 0.0], vec![1.0, -1.0]),
    ] {
        let [a, b] = [&x, &y].map(|x| DeviceVector::new(&home, x).unwrap());
        let want: f64 = x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
        let got = a.dot(&b);
        assert!((got - want).abs() <= SUM_TOLERANCE * want.abs(), "{x:?}·{y:?}: {got:e}, want {want:e}");
    }
}

#[test]
fn nan_and_infinity_count_as_on_the_cpu() {
    let Some(mut space) = space() else { return };
    space.force(BLOCK);
    let home = space.home();
    let special = [0.0, -0.0, 1.0, -1.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE / 4.0];
    for len in [3, 5000] {
        for &p in &special {
            for &q in &special {
                for at in [0, len - 1] {
                    let mut x = vec![1.0; len];
                    let mut y = vec![0.5; len];
                    (x[at], y[at], x[1]) = (p, q, if at == 0 { f32::INFINITY } else { 1.0 });
                    let [cpu_x, cpu_y] = [&x, &y].map(|x| HostVector::from(&x[..]));
                    let [gpu_x, gpu_y] = [&x, &y].map(|x| DeviceVector::new(&home, x).unwrap());
                    let want =
                        HostVector::reduce([Reduction::Dot(&cpu_x, &cpu_y), Reduction::SumAbs(&cpu_y), cpu_y.whole()]);
                    let got = DeviceVector::reduce([
                        Reduction::Dot(&gpu_x, &gpu_y),
                        Reduction::SumAbs(&gpu_y),
                        gpu_y.whole(),
                    ]);
                    for (got, want) in got.into_iter().zip(want) {
                        let close = got == want || (got - want).abs() <= SUM_TOLERANCE * want.abs();
                        assert!(close || got.is_nan() && want.is_nan(), "{p}·{q}: {got:e}, want {want:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn elementwise_operations_have_the_cpus_bits() {
    let Some(mut space) = space() else { return };
    let software = space.device().unwrap().software;
    space.force(BLOCK);
    let home = space.home();
    for len in LENGTHS {
        let [x, y] = [3, 4].map(|seed| hostile(seed, len, 12.0));
        let [cpu_x, cpu_y] = [&x, &y].map(|x| HostVector::from(&x[..]));
        let [gpu_x, gpu_y] = [&x, &y].map(|x| DeviceVector::new(&home, x).unwrap());
        let all = |of: &dyn Fn() -> (HostVector<f32>, DeviceVector), what: &str| {
            let (want, got) = of();
            let got = got.to_host().unwrap();
            assert_eq!(want.len(), got.len());
            for (((want, got), x), y) in want.iter().zip(&*got).zip(&x).zip(&y) {
                // Hardware may round once where the CPU rounds a product and then a sum of these.
                let near = !software && f64::from(got - want).abs() <= 1e-6 * f64::from(x.abs().max(y.abs()));
                assert!(want.to_bits() == got.to_bits() || near, "{what}: {got:e}, want {want:e}");
            }
        };
        fn each<V: Vector>(x: &V, y: &V) -> [V; 5] {
            let (mut sum, mut moved, mut scaled) = (V::default(), x.clone(), x.clone());
            sum.set_to_sum(x, 0.3, y);
            moved.add_scaled(-1.7, y);
            scaled.scale(1e-3);
            [sum, moved, scaled, x.minus(y), x.negative()]
        }
        let (cpu, gpu) = (each(&cpu_x, &cpu_y), each(&gpu_x, &gpu_y));
        DeviceVector::outcome(&home).unwrap();
        for (i, (cpu, gpu)) in cpu.into_iter().zip(gpu).enumerate() {
            all(&|| (cpu.clone(), gpu.clone()), &format!("{len} elements, operation {i}"));
        }
        assert_eq!(*gpu_x.to_host().unwrap(), *x, "what was read is as it was");
    }
}

// ---- whole steps ---------------------------------------------------------------------------------------------

type Function = fn(&[f64], &mut [f64]) -> f64;

fn rosenbrock(x: &[f64], g: &mut [f64]) -> f64 {
    g.fill(0.0);
    let mut loss = 0.0;
    for i in 1..x.len() {
        let (valley, slope) = (x[i] - x[i - 1] * x[i - 1], 1.0 - x[i - 1]);
        loss += 100.0 * valley * valley + slope * slope;
        g[i - 1] -= 400.0 * x[i - 1] * valley + 2.0 * slope;
        g[i] += 200.0 * valley;
    }
    loss
}

/// Condition number 1e4, minimum at 1.
fn quadratic(x: &[f64], g: &mut [f64]) -> f64 {
    let mut loss = 0.0;
    for (i, (x, g)) in x.iter().zip(g).enumerate() {
        let weight = 1e4f64.powf((i % 50) as f64 / 49.0);
        *g = weight * (x - 1.0);
        loss += 0.5 * *g * (x - 1.0);
    }
    loss
}

/// Mean logistic loss of 40 rows that are drawn, with a small penalty.
fn logistic(x: &[f64], g: &mut [f64]) -> f64 {
    const ROWS: usize = 40;
    let (mut draw, mut loss) = (random(7), 0.0);
    g.iter_mut().zip(x).for_each(|(g, x)| *g = 0.01 * x);
    for row in 0..ROWS {
        let features: Vec<f64> = x.iter().map(|_| draw()).collect();
        let label = if row % 3 == 0 { -1.0 } else { 1.0 };
        let margin = label * features.iter().zip(x).map(|(f, x)| f * x).sum::<f64>();
        loss += (-margin).exp().ln_1p() / ROWS as f64;
        let slope = -label / (1.0 + margin.exp()) / ROWS as f64;
        g.iter_mut().zip(features).for_each(|(g, f)| *g += slope * f);
    }
    loss + 0.005 * x.iter().map(|x| x * x).sum::<f64>()
}

/// Functions and numbers of elements.
const FUNCTIONS: [(&str, Function, usize); 4] = [
    ("rosenbrock", rosenbrock, 10),
    ("quadratic", quadratic, 50),
    ("long quadratic", quadratic, 3 * BLOCK + 5),
    ("logistic", logistic, 12),
];

/// The methods, by name and settings.
fn methods() -> [(&'static str, Vec<(&'static str, Value)>); 3] {
    [
        ("LBFGS", vec![("lr", Value::Float(0.5))]),
        ("LBFGS", vec![("line_search_fn", Value::Choice(Choice::StrongWolfe)), ("history_size", Value::Int(7))]),
        ("ConjugateGradient", vec![]),
    ]
}

/// Parameters of a third of the elements and of the rest.
fn with_params(mut optimizer: Optimizer, hypers: &[(&str, Value)], n: usize) -> Optimizer {
    let infos = [("a", n / 3), ("b", n - n / 3)].map(|(name, len)| ParamInfo::vector(name, len, Dtype::F32));
    optimizer.add_group(hypers, infos.into()).unwrap();
    optimizer
}

fn on_cpu(name: &str, hypers: &[(&str, Value)], n: usize) -> Optimizer {
    with_params(Optimizer::cpu(name, &Options::default()).unwrap(), hypers, n)
}

fn on_gpu(name: &str, hypers: &[(&str, Value)], n: usize, window: usize) -> Optimizer {
    let mut optimizer = Optimizer::gpu(name, &Options::default(), &request()).unwrap();
    optimizer.force_gpu(window, BLOCK);
    with_params(optimizer, hypers, n)
}

/// One step; the points where the loss was evaluated and, at last, where it ended.
fn step(optimizer: &mut Optimizer, x: &mut [f32], f: Function) -> Vec<Vec<f32>> {
    let third = x.len() / 3;
    let both = |x: &mut [f32], run: &mut dyn FnMut(&mut [TensorMut<'_>])| {
        let (a, b) = x.split_at_mut(third);
        run(&mut [a.into(), b.into()]);
    };
    both(x, &mut |params| optimizer.begin(params).unwrap());
    let (mut points, mut ask) = (Vec::new(), Ask::Evaluate);
    while ask == Ask::Evaluate {
        points.push(x.to_vec());
        let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let mut g = vec![0.0; x.len()];
        let loss = f(&wide, &mut g);
        let g: Vec<f32> = g.iter().map(|&g| g as f32).collect();
        let gradients: [Option<TensorRef<'_>>; 2] = [Some(g[..third].into()), Some(g[third..].into())];
        both(x, &mut |params| ask = optimizer.tell(loss, params, &gradients).unwrap());
    }
    points.push(x.to_vec());
    points
}

fn start(n: usize) -> Vec<f32> {
    [-1.2, 1.0].into_iter().cycle().take(n).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// On a software adapter the first steps have the same points. Later a difference of a sum's last bit grows from
/// iteration to iteration, and with it that of the points; that both still come down is all that can be said.
#[test]
fn both_backends_ask_for_the_same_points() {
    let Some(space) = space() else { return };
    let software = space.device().unwrap().software;
    for (name, f, n) in FUNCTIONS {
        for (method, hypers) in methods() {
            for window in [BLOCK, 1 << 25] {
                let what = format!("{method} {hypers:?} of {name}");
                let (mut cpu, mut gpu) = (on_cpu(method, &hypers, n), on_gpu(method, &hypers, n, window));
                let mut x = [start(n), start(n)];
                let [want, got] = [step(&mut cpu, &mut x[0], f), step(&mut gpu, &mut x[1], f)];
                // Hardware may round other products and sums together, so that only the way out is the same.
                let (points, tolerance) = if software { (want.len(), POINT_TOLERANCE) } else { (5, 1e-3) };
                assert!(want.len() == got.len() || !software, "{what}");
                let pairs = want.iter().zip(&got).take(points).flat_map(|(want, got)| want.iter().zip(got));
                let worst = pairs.map(|(want, got)| f64::from((want - got).abs())).fold(0.0, f64::max);
                eprintln!("{method} of {name}: {worst:.1e}");
                assert!(worst <= tolerance, "{what}: {worst:e}");
                let loss = |x: &[f32]| f(&x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), &mut vec![0.0; n]);
                assert!(loss(&x[1]) < loss(&start(n)), "{what}");
            }
        }
    }
}

#[test]
fn windows_change_no_bit() {
    if space().is_none() {
        return;
    }
    let n = 3 * BLOCK + 5;
    for (method, hypers) in methods() {
        let mut ends = [BLOCK, 2 * BLOCK, 1 << 25].map(|window| {
            let (mut gpu, mut x) = (on_gpu(method, &hypers, n, window), start(n));
            step(&mut gpu, &mut x, quadratic);
            (x, gpu.state_dict().unwrap())
        });
        let first = ends[0].clone();
        assert!(ends.iter_mut().all(|end| *end == first), "{method}");
    }
}

fn with_same_bits(a: &StateDict, b: &StateDict) -> bool {
    // Each float by its shortest text, which tells every two apart.
    format!("{a:?}") == format!("{b:?}")
}

#[test]
fn state_moves_between_backends() {
    if space().is_none() {
        return;
    }
    for (method, hypers) in methods() {
        let n = BLOCK + 6;
        let (mut cpu, mut x) = (on_cpu(method, &hypers, n), start(n));
        step(&mut cpu, &mut x, rosenbrock);
        let saved = cpu.state_dict().unwrap();
        let mut gpu = on_gpu(method, &[], n, BLOCK);
        gpu.load_state_dict(&saved).unwrap();
        assert!(with_same_bits(&gpu.state_dict().unwrap(), &saved), "{method}");
        let mut y = x.clone();
        let (want, got) = (step(&mut cpu, &mut x, rosenbrock), step(&mut gpu, &mut y, rosenbrock));
        assert_eq!(want[0], got[0]);
        // The first iteration's direction is of the whole memory.
        let largest = want[1].iter().zip(&got[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest <= 1e-6, "{method}: {largest:e}");
        let saved = gpu.state_dict().unwrap();
        cpu.load_state_dict(&saved).unwrap();
        assert!(with_same_bits(&cpu.state_dict().unwrap(), &saved), "{method}");
    }
}

#[test]
fn a_resumed_run_has_the_bits_of_one_that_went_on() {
    if space().is_none() {
        return;
    }
    for (method, hypers) in methods() {
        let n = BLOCK + 6;
        let (mut whole, mut x) = (on_gpu(method, &hypers, n, BLOCK), start(n));
        step(&mut whole, &mut x, rosenbrock);
        let (mut resumed, mut y) = (on_gpu(method, &[], n, BLOCK), x.clone());
        resumed.load_state_dict(&whole.state_dict().unwrap()).unwrap();
        for _ in 0..2 {
            let (want, got) = (step(&mut whole, &mut x, rosenbrock), step(&mut resumed, &mut y, rosenbrock));
            assert!(want.iter().map(|x| bits(x)).eq(got.iter().map(|x| bits(x))), "{method}");
        }
        assert!(with_same_bits(&whole.state_dict().unwrap(), &resumed.state_dict().unwrap()), "{method}");
    }
}

#[test]
fn an_abandoned_step_changes_no_bit() {
    if space().is_none() {
        return;
    }
    for (method, hypers) in methods() {
        let n = 30;
        let (mut gpu, mut x) = (on_gpu(method, &hypers, n, BLOCK), start(n));
        step(&mut gpu, &mut x, rosenbrock);
        let (saved, before) = (gpu.state_dict().unwrap(), x.clone());
        for evaluations in 0..4 {
            let (a, b) = x.split_at_mut(n / 3);
            let params = &mut [a.into(), b.into()];
            gpu.begin(params).unwrap();
            for k in 0..evaluations {
                let g = vec![0.1f32 * (k + 1) as f32; n];
                let gradients = [Some(g[..n / 3].into()), Some(g[n / 3..].into())];
                assert_eq!(gpu.tell(10.0 - f64::from(k), params, &gradients).unwrap(), Ask::Evaluate);
            }
            assert!(with_same_bits(&gpu.state_dict().unwrap(), &saved), "state under way is that of the last step");
            gpu.abandon(Some(params)).unwrap();
            assert_eq!(bits(&x), bits(&before), "{method} after {evaluations}");
            assert!(with_same_bits(&gpu.state_dict().unwrap(), &saved), "{method} after {evaluations}");
        }
    }
}

#[test]
fn a_parameter_without_a_gradient_rests() {
    if space().is_none() {
        return;
    }
    for (method, hypers) in methods() {
        let (mut gpu, mut x) = (on_gpu(method, &hypers, 30, BLOCK), start(30));
        step(&mut gpu, &mut x, rosenbrock);
        let resting = bits(&x[..10]);
        let (a, b) = x.split_at_mut(10);
        let params = &mut [a.into(), b.into()];
        gpu.begin(params).unwrap();
        let g = vec![1.0f32; 20];
        let mut loss = 0.0;
        while gpu.tell(loss, params, &[None, Some(g.as_slice().into())]).unwrap() == Ask::Evaluate {
            loss -= 1.0;
        }
        assert_eq!(bits(&x[..10]), resting, "{method}");
    }
}

#[test]
fn minimum_limits_and_refusals() {
    if space().is_none() {
        return;
    }
    let minimum = DeviceRequest { minimum_limits: true, ..request() };
    for (method, hypers) in methods() {
        let n = BLOCK + 1;
        let small = Optimizer::gpu(method, &Options::default(), &minimum).unwrap();
        let (mut small, mut plain) = (with_params(small, &hypers, n), on_gpu(method, &hypers, n, usize::MAX / 2));
        let mut x = [start(n), start(n)];
        assert_eq!(step(&mut small, &mut x[0], quadratic), step(&mut plain, &mut x[1], quadratic), "{method}");

        for dtype in [Dtype::F64, Dtype::C128] {
            let error = plain.add_group(&hypers, vec![ParamInfo::vector("w", 2, dtype)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Type);
            assert_eq!(
                error.to_string(),
                format!(
                    "{method}: parameter \"w\" must be float32, float16, bfloat16 or complex64 on the GPU, got {dtype}; \
                     use backend=\"cpu\" for {dtype}"
                )
            );
        }
        // A parameter that is added forgets what was learned, and the counts stay.
        let counts = plain.joint_value(0, "n_iter").unwrap();
        plain.add_group(&hypers, vec![ParamInfo::vector("c", 2, Dtype::C64)]).unwrap();
        assert_eq!(plain.joint_value(0, "n_iter").unwrap(), counts);
        assert_eq!(plain.joint_value(0, "d").unwrap(), None);
    }
}

#[test]
fn optimizers_share_a_device_across_threads() {
    if space().is_none() {
        return;
    }
    std::thread::scope(|scope| {
        for n in 20..24 {
            scope.spawn(move || {
                let (method, hypers) = &methods()[n % 3];
                let ends = [(); 2].map(|()| {
                    let (mut gpu, mut x) = (on_gpu(method, hypers, n, BLOCK), start(n));
                    (0..3).for_each(|_| drop(step(&mut gpu, &mut x, rosenbrock)));
                    bits(&x)
                });
                assert_eq!(ends[0], ends[1]);
            });
        }
    });
}
