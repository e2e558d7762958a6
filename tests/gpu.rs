//! Whole steps, CPU against GPU, for every optimizer of the registry.
//!
//! On a software adapter parameters and slots must agree bit for bit. A hardware adapter may fuse a
//! multiplication with an addition and may be 2.5 ulp off in a division and a square root, so there the
//! measure is `|Δ| / max(|want|, mean |want|)`, at most [`HARDWARE_TOLERANCE`] after ten steps. [`TOLERANCES`] has the
//! optimizers whose sums or products cannot have the CPU's bits on any adapter.
//!
//! Without an adapter the tests print a line and pass; `ROPTIM_REQUIRE_GPU=1` makes them fail.

#![cfg(feature = "gpu")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::sync::{Arc, OnceLock};

use roptim::gpu::{self, DeviceRequest};
use roptim::hyper::Choice;
use roptim::rules::Method;
use roptim::tensor::{RawTensor, Strides};
use roptim::{
    Dtype, ErrorKind, Guard, Nonfinite, Optimizer, Options, ParamInfo, Preset, REGISTRY, Range, TensorMut, TensorRef,
    Value,
};

/// A few ulp in each of ten steps; a step changes parameters by about 1e-2 of their size.
const HARDWARE_TOLERANCE: f64 = 1e-5;

/// What an optimizer may differ by from the CPU on a software adapter, where that is not nothing, with the reason in
/// docs/numerics.md. A hardware adapter adds [`HARDWARE_TOLERANCE`].
const TOLERANCES: &[(&str, f64)] = &[("Adafactor", 2.5e-7), ("Muon", 5e-6)];
/// Beyond this a tolerance tests little: a step moves a parameter by about 1e-2 of its size.
const LARGEST_TOLERANCE: f64 = 1e-5;

fn tolerance(name: &str, software: bool) -> f64 {
    let own = TOLERANCES.iter().find(|(of, _)| *of == name).map_or(0.0, |(_, tolerance)| *tolerance);
    own + if software { 0.0 } else { HARDWARE_TOLERANCE }
}

#[test]
fn tolerances_are_capped_and_of_tensor_rules_alone() {
    for &(name, tolerance) in TOLERANCES {
        assert!(tolerance <= LARGEST_TOLERANCE, "{name}");
        assert!(matches!(Preset::find(name).unwrap().method, Method::Tensor(_)), "{name}");
    }
}

type Hypers = Vec<(&'static str, Value)>;

/// The optimizers whose steps take gradients; tests/gpu_closure.rs has the others.
fn with_shader() -> impl Iterator<Item = &'static Preset> {
    REGISTRY.iter().filter(|preset| preset.has_shader() && !preset.needs_closure())
}

fn request() -> DeviceRequest {
    DeviceRequest { allow_software: true, ..DeviceRequest::default() }
}

/// Whether the chosen adapter is a software one; `None` where there is none at all.
fn software() -> Option<bool> {
    match Optimizer::gpu("SGD", &Options::default(), &request()) {
        Ok(optimizer) => Some(optimizer.device().unwrap().unwrap().software),
        Err(e) if e.kind() == ErrorKind::NoAdapter => {
            assert!(std::env::var("ROPTIM_REQUIRE_GPU").as_deref() != Ok("1"), "{e}");
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn optimizers(name: &str) -> [Optimizer; 2] {
    let options = Options::default();
    [Optimizer::cpu(name, &options).unwrap(), Optimizer::gpu(name, &options, &request()).unwrap()]
}

/// Numbers in about [−1, 1], with both zeros, subnormal, tiny and large ones among them. Hardware may take a subnormal
/// number, and a product that is one, for zero, which rules amplify; there none of them has such a product.
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    static KEEPS_SUBNORMALS: OnceLock<bool> = OnceLock::new();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let special = if *KEEPS_SUBNORMALS.get_or_init(|| software() != Some(false)) {
        [0.0, -0.0, 1e-41, -3e-39, 1e-20, -1e-12, 3e4, f32::MIN_POSITIVE]
    } else {
        [0.0, -0.0, 1e-15, -3e-16, 1e-17, -1e-12, 3e4, -1e-17]
    };
    (0..len).map(|i| if i % 23 == 7 { special[(i / 23) % special.len()] } else { draw() }).collect()
}

/// The same bits without a tolerance; else close, and not finite in the same way.
fn compare_within(tolerance: f64, want: &[f32], got: &[f32], what: &str) {
    assert_eq!(want.len(), got.len(), "{what}");
    let mean = want.iter().map(|x| f64::from(x.abs())).sum::<f64>() / want.len().max(1) as f64;
    for (i, (&w, &g)) in want.iter().zip(got).enumerate() {
        let (wide, narrow) = (f64::from(w), f64::from(g));
        let close = if tolerance == 0.0 {
            w.to_bits() == g.to_bits()
        } else {
            w.is_nan() && g.is_nan() || w == g || (wide - narrow).abs() <= tolerance * wide.abs().max(mean)
        };
        assert!(close, "{what}[{i}]: the CPU has {w:e} ({:#x}), the GPU {g:e} ({:#x})", w.to_bits(), g.to_bits());
    }
}

fn compare(software: bool, want: &[f32], got: &[f32], what: &str) {
    compare_within(if software { 0.0 } else { HARDWARE_TOLERANCE }, want, got, what);
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn compare_state(software: bool, optimizers: &mut [Optimizer; 2], what: &str) {
    let tolerance = tolerance(optimizers[0].preset().name, software);
    let [cpu, gpu] = optimizers.each_mut().map(|o| o.state_dict().unwrap());
    assert_eq!(cpu.groups, gpu.groups);
    assert_eq!(cpu.update_count, gpu.update_count);
    assert_eq!(cpu.state.keys().collect::<Vec<_>>(), gpu.state.keys().collect::<Vec<_>>(), "{what}");
    for (index, want) in &cpu.state {
        let got = &gpu.state[index];
        assert_eq!(want.step, got.step, "{what}");
        assert_eq!(want.slots.keys().collect::<Vec<_>>(), got.slots.keys().collect::<Vec<_>>(), "{what}");
        for (key, slot) in &want.slots {
            let what = format!("{what}: {key} of {index}");
            match (slot.array(), got.slots[key].array()) {
                (Some(want), Some(got)) => compare_within(tolerance, &floats(&want.bytes), &floats(&got.bytes), &what),
                _ => assert_eq!(slot, &got.slots[key], "{what}"),
            }
        }
    }
}

/// Every combination of the hyperparameters that the preset accepts: each switch off and on, each number
/// that is 0 by default also 0.3, each pair also with a first member small enough for the other branch of
/// `lerp`.
fn variants(preset: &Preset) -> Vec<Hypers> {
    let mut all: Vec<Hypers> = vec![vec![("lr", Value::Float(0.02))]];
    for hyper in preset.declaration().hypers {
        let other = match (hyper.range, hyper.default) {
            (Range::Flag, Value::Bool(default)) => Value::Bool(!default),
            (Range::PairFrom(..), _) => Value::Pair([0.4, 0.95]),
            (_, Value::Float(0.0)) => Value::Float(0.3),
            _ => continue,
        };
        let changed: Vec<Hypers> =
            all.iter().map(|base| base.iter().copied().chain([(hyper.name, other)]).collect()).collect();
        all.extend(changed);
    }
    all.retain(|changes| preset.set("", &mut preset.hypers(), changes).is_ok());
    all
}

const LENGTHS: [usize; 7] = [1, 3, 64, 65, 0, 1000, 4099];

/// Parameter `index` has no gradient in some of the steps.
fn has_gradient(index: usize, step: usize) -> bool {
    (index + step) % 4 != 3
}

/// Shapes of the parameters: a tensor rule has some of every kind that it takes.
fn shapes(name: &str) -> Vec<Vec<usize>> {
    match name {
        "Adafactor" => [&[][..], &[3, 5], &[65], &[130, 7], &[0, 4], &[2, 10, 50], &[1, 4099]].map(Vec::from).into(),
        "Muon" => [[1, 1], [3, 5], [64, 1], [1, 65], [0, 4], [40, 25], [129, 70]].map(Vec::from).into(),
        _ => LENGTHS.map(|n| vec![n]).into(),
    }
}

/// Small windows and chunks: whole tensors must fit into a window, and chunks of few elements need working memory.
fn small(name: &str) -> [(usize, usize); 3] {
    match name {
        "Adafactor" => [(16_384, 4), (4160, 60), (4160, 4096)],
        "Muon" => [(32_768, 4), (9088, 60), (9088, 4096)],
        _ => [(64, 4), (128, 60), (1024, 4096)],
    }
}

fn infos_of(name: &str, range: std::ops::Range<usize>, resident: bool) -> Vec<ParamInfo> {
    let shapes = shapes(name);
    let info =
        |i: usize| ParamInfo { name: Some(format!("p{i}")), shape: shapes[i].clone(), dtype: Dtype::F32, resident };
    range.map(info).collect()
}

/// Those of an elementwise rule.
fn infos(range: std::ops::Range<usize>, resident: bool) -> Vec<ParamInfo> {
    infos_of("", range, resident)
}

fn step(optimizer: &mut Optimizer, values: &mut [Vec<f32>], gradients: &[Option<Vec<f32>>]) -> roptim::Result<()> {
    let gradients: Vec<Option<TensorRef<'_>>> =
        gradients.iter().map(|g| g.as_ref().map(|g| g.as_slice().into())).collect();
    let mut params: Vec<TensorMut<'_>> = values.iter_mut().map(|v| v.as_mut_slice().into()).collect();
    optimizer.step(&mut params, &gradients)
}

fn lengths(name: &str) -> Vec<usize> {
    shapes(name).iter().map(|shape| shape.iter().product()).collect()
}

fn start_of(name: &str) -> Vec<Vec<f32>> {
    lengths(name).into_iter().enumerate().map(|(i, n)| numbers(i as u64 + 1, n)).collect()
}

fn start() -> Vec<Vec<f32>> {
    start_of("")
}

fn gradients_of(name: &str, at: usize) -> Vec<Option<Vec<f32>>> {
    let one = |(i, n)| has_gradient(i, at).then(|| numbers((100 * at + i) as u64, n));
    lengths(name).into_iter().enumerate().map(one).collect()
}

fn gradients(at: usize) -> Vec<Option<Vec<f32>>> {
    gradients_of("", at)
}

/// Ten steps of both backends, and everything compared.
fn run(name: &str, hypers: &[(&str, Value)], adapt: impl FnOnce(&mut Optimizer)) {
    let Some(software) = software() else { return };
    let mut both = optimizers(name);
    adapt(&mut both[1]);
    for optimizer in &mut both {
        optimizer.add_group(hypers, infos_of(name, 0..4, false)).unwrap();
        optimizer.add_group(&[("lr", Value::Float(0.005))], infos_of(name, 4..7, false)).unwrap();
    }
    let mut values = [start_of(name), start_of(name)];
    for at in 0..10 {
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            step(optimizer, values, &gradients_of(name, at)).unwrap();
        }
        let what = format!("{name} {hypers:?} step {at}");
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare_within(tolerance(name, software), want, got, &format!("{what}: parameter {i}"));
        }
    }
    compare_state(software, &mut both, &format!("{name} {hypers:?}"));
}

#[test]
fn every_variant_of_every_optimizer_agrees_with_the_cpu() {
    for preset in with_shader() {
        for hypers in variants(preset) {
            run(preset.name, &hypers, |_| {});
        }
    }
}

#[test]
fn tiny_windows_and_chunks_change_nothing() {
    for preset in with_shader() {
        let hypers = variants(preset).pop().unwrap();
        for (window, chunk) in small(preset.name) {
            run(preset.name, &hypers, |gpu| gpu.force_gpu(window, chunk));
        }
    }
}

#[test]
fn minimum_limits_change_nothing() {
    if software().is_none() {
        return;
    }
    for preset in with_shader() {
        run(preset.name, &variants(preset).pop().unwrap(), |gpu| {
            let minimum = DeviceRequest { minimum_limits: true, ..request() };
            *gpu = Optimizer::gpu(preset.name, &Options::default(), &minimum).unwrap();
        });
    }
}

#[test]
fn more_workgroups_than_one_axis_holds() {
    let Some(software) = software() else { return };
    const N: usize = 4 * 65_535 + 37;
    let mut both = optimizers("SGD");
    both[1].force_gpu(1 << 20, 4);
    let mut values = [vec![numbers(1, N)], vec![numbers(1, N)]];
    for (optimizer, values) in both.iter_mut().zip(&mut values) {
        optimizer.add_group(&[], vec![ParamInfo::vector("w", N, Dtype::F32)]).unwrap();
        step(optimizer, values, &[Some(numbers(2, N))]).unwrap();
    }
    compare(software, &values[0][0], &values[1][0], "w");
}

#[test]
fn a_group_added_later_and_a_slot_needed_later() {
    let Some(software) = software() else { return };
    let mut both = optimizers("SGD");
    let mut values = [start(), start()];
    for (optimizer, values) in both.iter_mut().zip(&mut values) {
        let gradients = gradients(0);
        optimizer.add_group(&[], infos(0..4, false)).unwrap();
        step(optimizer, &mut values[..4], &gradients[..4]).unwrap();
        optimizer.add_group(&[("momentum", Value::Float(0.9))], infos(4..7, false)).unwrap();
        step(optimizer, values, &gradients).unwrap();
        optimizer.set_hypers(0, &[("momentum", Value::Float(0.5))]).unwrap();
        (1..4).for_each(|at| step(optimizer, values, &self::gradients(at)).unwrap());
        // A momentum buffer that is taken back and needed again is the gradient itself once more.
        optimizer.reset(0).unwrap();
        optimizer.reset(5).unwrap();
        assert!(optimizer.slot_keys(5).is_empty());
        (4..7).for_each(|at| step(optimizer, values, &self::gradients(at)).unwrap());
    }
    for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
        compare(software, want, got, &format!("parameter {i}"));
    }
    compare_state(software, &mut both, "SGD");
}

#[test]
fn a_slot_that_was_reset_begins_as_zero() {
    let Some(software) = software() else { return };
    for preset in with_shader() {
        let mut both = optimizers(preset.name);
        let mut values = [start_of(preset.name), start_of(preset.name)];
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            optimizer.add_group(&variants(preset).pop().unwrap(), infos_of(preset.name, 0..7, false)).unwrap();
            (0..3).for_each(|at| step(optimizer, values, &gradients_of(preset.name, at)).unwrap());
            optimizer.reset(2).unwrap();
            assert!(!optimizer.has_state(2) && optimizer.slot_keys(2).is_empty());
            (3..6).for_each(|at| step(optimizer, values, &gradients_of(preset.name, at)).unwrap());
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare_within(tolerance(preset.name, software), want, got, &format!("{} parameter {i}", preset.name));
        }
        compare_state(software, &mut both, preset.name);
    }
}

#[test]
fn subnormal_slots_are_kept_when_asked_for() {
    let Some(true) = software() else { return };
    for flush_subnormals in [true, false] {
        let options = Options { flush_subnormals, ..Options::default() };
        let mut both = [Optimizer::cpu("SGD", &options).unwrap(), Optimizer::gpu("SGD", &options, &request()).unwrap()];
        let mut values = [vec![vec![1.0f32; 5]], vec![vec![1.0f32; 5]]];
        let tiny = vec![1e-40f32, -1e-40, -0.0, f32::MIN_POSITIVE, 1.0];
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            let info = ParamInfo::vector("w", 5, Dtype::F32);
            optimizer.add_group(&[("momentum", Value::Float(0.5))], vec![info]).unwrap();
            step(optimizer, values, &[Some(tiny.clone())]).unwrap();
            step(optimizer, values, &[Some(tiny.clone())]).unwrap();
        }
        compare_state(true, &mut both, &format!("flush_subnormals {flush_subnormals}"));
    }
}

#[test]
fn nan_and_infinity_spread_as_on_the_cpu() {
    let Some(software) = software() else { return };
    let info = |name: &str| {
        let shape = if name == "Muon" { vec![2, 3] } else { vec![6] };
        ParamInfo { name: None, shape, dtype: Dtype::F32, resident: false }
    };
    let more: [(&str, &[(&str, Value)]); 3] = [
        ("SGD", &[("momentum", Value::Float(0.9))]),
        ("Adam", &[("amsgrad", Value::Bool(true))]),
        ("RMSprop", &[("centered", Value::Bool(true)), ("momentum", Value::Float(0.9))]),
    ];
    let plain = with_shader().map(|p| (p.name, &[][..]));
    for (name, hypers) in plain.chain(more) {
        let mut both = optimizers(name);
        let mut values = [vec![vec![1.0f32; 6]], vec![vec![1.0f32; 6]]];
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            optimizer.add_group(hypers, vec![info(name)]).unwrap();
            // Hardware need not divide by more than 2^126, and a product that is fused with a sum does not overflow.
            let large = if software { [f32::INFINITY, f32::NEG_INFINITY, f32::MAX] } else { [f32::NAN, 2.0, 3.0] };
            let bad = vec![f32::NAN, large[0], large[1], 0.0, 1.0, large[2]];
            for gradient in [vec![1.0; 6], bad, vec![1.0; 6]] {
                step(optimizer, values, &[Some(gradient)]).unwrap();
            }
        }
        let finite = |x: &f32| if x.is_finite() { *x } else { 0.0 };
        let agree = |want: &[f32], got: &[f32], what: &str| {
            let class = |x: &f32| (x.is_nan(), x.is_infinite().then(|| x.is_sign_negative()));
            assert!(want.iter().map(class).eq(got.iter().map(class)), "{what}: {want:?} against {got:?}");
            let [want, got] = [want, got].map(|values| values.iter().map(finite).collect::<Vec<_>>());
            compare(software, &want, &got, what);
        };
        agree(&values[0][0], &values[1][0], name);
        let states = both.each_mut().map(|o| o.state_dict().unwrap().state.remove(&0));
        let [Some(cpu), Some(gpu)] = states else {
            assert_eq!(states, [None, None], "{name}");
            continue;
        };
        for (key, want) in cpu.slots.iter().filter_map(|(key, want)| Some((key, want.array()?))) {
            let (want, got) = (floats(&want.bytes), floats(&gpu.slots[key].array().unwrap().bytes));
            agree(&want, &got, &format!("{name} {key}"));
        }
    }
}

#[test]
fn a_resident_parameter_stays_on_the_device() {
    let Some(software) = software() else { return };
    let mut both = optimizers("AdamW");
    let mut values = [start(), start()];
    for optimizer in &mut both {
        optimizer.add_group(&[], infos(0..3, true)).unwrap();
        optimizer.add_group(&[], infos(3..7, false)).unwrap();
    }
    for at in 0..6 {
        let [cpu, gpu] = &mut both;
        let before = values[1].clone();
        if at == 3 {
            // The user writes the host's copy of parameter 2: on the GPU that has to be said.
            gpu.sync(&mut [(2, &mut values[1][2].as_mut_slice().into())]).unwrap();
            for values in &mut values {
                values[2][5] = 7.0;
            }
            gpu.host_written(2);
        }
        step(cpu, &mut values[0], &gradients(at)).unwrap();
        step(gpu, &mut values[1], &gradients(at)).unwrap();
        assert!(!cpu.host_is_stale(0));
        if at != 3 {
            assert_eq!(values[1][..3], before[..3], "a resident parameter is not written back");
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate().skip(3) {
            assert!(!gpu.host_is_stale(i));
            compare(software, want, got, &format!("plain parameter {i}"));
        }
    }
    let [cpu, gpu] = &mut both;
    let [on_cpu, on_gpu] = &mut values;
    for (i, (want, got)) in on_cpu.iter_mut().zip(on_gpu).enumerate().take(3) {
        assert!(gpu.host_is_stale(i));
        gpu.sync(&mut [(i, &mut got.as_mut_slice().into())]).unwrap();
        cpu.sync(&mut [(i, &mut want.as_mut_slice().into())]).unwrap();
        assert!(!gpu.host_is_stale(i));
        compare(software, want, got, &format!("resident parameter {i}"));
    }
    let wrong = gpu.sync(&mut [(1, &mut vec![0.0f32; 2].as_mut_slice().into())]).unwrap_err();
    assert_eq!(wrong.to_string(), "AdamW.sync: parameter \"p1\" must be of 3 elements, got 2");
    compare_state(software, &mut both, "AdamW");
}

#[test]
fn float64_is_refused_before_anything_changes() {
    if software().is_none() {
        return;
    }
    let mut adamw = Optimizer::gpu("AdamW", &Options::default(), &request()).unwrap();
    let params = vec![ParamInfo::vector("b", 2, Dtype::F32), ParamInfo::vector("w", 2, Dtype::F64)];
    let error = adamw.add_group(&[], params).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Type);
    assert_eq!(
        error.to_string(),
        "AdamW: parameter \"w\" must be float32, float16, bfloat16 or complex64 on the GPU, got float64; use backend=\"cpu\" for float64"
    );
    assert!(adamw.entries().is_empty() && adamw.groups().is_empty());
    adamw.add_group(&[], vec![ParamInfo::vector("w", 2, Dtype::F32)]).unwrap();
    step(&mut adamw, &mut [vec![1.0, 2.0]], &[Some(vec![0.1, 0.2])]).unwrap();
}

#[test]
fn a_selector_that_fits_nothing_is_named() {
    let request = DeviceRequest { selector: Some("no such adapter".into()), ..request() };
    let error = Optimizer::gpu("Adam", &Options::default(), &request).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoAdapter);
    let text = error.to_string();
    let known = gpu::devices().unwrap();
    match known.first() {
        Some(device) => {
            assert!(text.starts_with("Adam: adapter must be an index or a part of a name of 0: "), "{text}");
            assert!(text.contains(&device.name) && text.ends_with("got no such adapter"), "{text}");
        }
        None => assert!(text.starts_with("Adam: backend must be \"cpu\" without a GPU, got \"gpu\"; "), "{text}"),
    }
}

/// A matrix in Fortran order, as columns of rows.
fn transposed(values: &mut [f32], rows: usize, columns: usize) -> RawTensor {
    assert_eq!(values.len(), rows * columns);
    let strides = Strides { shape: vec![rows, columns], bytes: vec![4, 4 * rows as isize] };
    RawTensor {
        ptr: values.as_mut_ptr().cast(),
        len: values.len(),
        dtype: Dtype::F32,
        strides: Some(Arc::new(strides)),
    }
}

#[test]
fn strided_arrays_have_the_same_bits_as_contiguous_ones() {
    if software().is_none() {
        return;
    }
    const ROWS: usize = 37;
    const COLUMNS: usize = 23;
    let fortran = |c: &[f32]| -> Vec<f32> { (0..ROWS * COLUMNS).map(|k| c[(k % ROWS) * COLUMNS + k / ROWS]).collect() };
    for (window, resident) in [(1 << 16, false), (128, false), (256, true)] {
        let info = ParamInfo { name: None, shape: vec![ROWS, COLUMNS], dtype: Dtype::F32, resident };
        let mut plain = Optimizer::gpu("AdamW", &Options::default(), &request()).unwrap();
        let mut strided = Optimizer::gpu("AdamW", &Options::default(), &request()).unwrap();
        strided.force_gpu(window, 100);
        plain.add_group(&[], vec![info.clone()]).unwrap();
        strided.add_group(&[], vec![info]).unwrap();
        let mut c_order = numbers(1, ROWS * COLUMNS);
        let mut f_order = fortran(&c_order);
        for at in 0..3 {
            let gradient = numbers(at + 10, ROWS * COLUMNS);
            let mut f_gradient = fortran(&gradient);
            plain.step(&mut [c_order.as_mut_slice().into()], &[Some(gradient.as_slice().into())]).unwrap();
            let (p, g) = (transposed(&mut f_order, ROWS, COLUMNS), transposed(&mut f_gradient, ROWS, COLUMNS));
            // SAFETY: both arrays live through the call and do not overlap.
            let (mut p, g) = unsafe { ([TensorMut::from_raw(p)], [Some(TensorRef::from_raw(g))]) };
            strided.step(&mut p, &g).unwrap();
        }
        plain.sync(&mut [(0, &mut c_order.as_mut_slice().into())]).unwrap();
        // SAFETY: as above.
        strided.sync(&mut [(0, &mut unsafe { TensorMut::from_raw(transposed(&mut f_order, ROWS, COLUMNS)) })]).unwrap();
        compare(true, &fortran(&c_order), &f_order, "strided");
        assert_eq!(plain.state_dict().unwrap(), strided.state_dict().unwrap());
    }
}

#[test]
fn state_moves_between_backends() {
    let Some(software) = software() else { return };
    for preset in with_shader() {
        let hypers = variants(preset).pop().unwrap();
        let mut both = optimizers(preset.name);
        both[1].force_gpu(small(preset.name)[1].0.max(256), 4096);
        let mut values = start_of(preset.name);
        both[0].add_group(&hypers, infos_of(preset.name, 0..7, false)).unwrap();
        both[1].add_group(&[], infos_of(preset.name, 0..7, false)).unwrap();
        (0..5).for_each(|at| step(&mut both[0], &mut values, &gradients_of(preset.name, at)).unwrap());
        let saved = both[0].state_dict().unwrap();
        both[1].load_state_dict(&saved).unwrap();
        assert_eq!(both[1].state_dict().unwrap(), saved, "{}", preset.name);
        let mut values = [values.clone(), values];
        for at in 5..10 {
            for (optimizer, values) in both.iter_mut().zip(&mut values) {
                step(optimizer, values, &gradients_of(preset.name, at)).unwrap();
            }
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare_within(tolerance(preset.name, software), want, got, &format!("{} parameter {i}", preset.name));
        }
        compare_state(software, &mut both, preset.name);
    }
}

#[test]
fn optimizers_share_a_device_across_threads() {
    let Some(software) = software() else { return };
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            scope.spawn(move || {
                let mut both = optimizers("Adam");
                let mut values = [vec![numbers(seed, 5000)], vec![numbers(seed, 5000)]];
                for (optimizer, values) in both.iter_mut().zip(&mut values) {
                    optimizer.add_group(&[], vec![ParamInfo::vector("w", 5000, Dtype::F32)]).unwrap();
                    for at in 0..20 {
                        step(optimizer, values, &[Some(numbers(seed * 100 + at, 5000))]).unwrap();
                    }
                }
                compare(software, &values[0][0], &values[1][0], "w");
            });
        }
    });
}

/// Parameters that store these, with numbers that each can hold.
fn stored(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// Bytes that are aligned for any dtype.
fn aligned(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(8).map(|chunk| chunk.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))).collect()
}

#[test]
fn half_precision_is_rounded_as_on_the_cpu() {
    let Some(software) = software() else { return };
    for (parameter, gradient) in
        [(Dtype::F16, Dtype::F16), (Dtype::F16, Dtype::F32), (Dtype::BF16, Dtype::BF16), (Dtype::BF16, Dtype::F32)]
    {
        for resident in [false, true] {
            let mut both = optimizers("AdamW");
            both[1].force_gpu(128, 100);
            let len = 1003;
            let (start, mut results) = (numbers(3, len), Vec::new());
            for optimizer in &mut both {
                // A float32 parameter beside it: each storage type has lines of its own.
                let infos = [parameter, Dtype::F32]
                    .map(|dtype| ParamInfo { resident, ..ParamInfo::vector(dtype.name(), len, dtype) });
                optimizer.add_group(&[("lr", Value::Float(0.02))], infos.to_vec()).unwrap();
                let mut narrow = aligned(&stored(parameter, &start));
                let mut wide = start.clone();
                let bytes = len * parameter.size();
                for at in 0..6 {
                    let values = numbers(50 + at, len);
                    let mut g = aligned(&stored(gradient, &values));
                    let g = RawTensor { ptr: g.as_mut_ptr().cast(), len, dtype: gradient, strides: None };
                    let p = RawTensor { ptr: narrow.as_mut_ptr().cast(), len, dtype: parameter, strides: None };
                    // SAFETY: all arrays live through the call and do not overlap.
                    let (p, g) = unsafe { (TensorMut::from_raw(p), TensorRef::from_raw(g)) };
                    let gradients = [Some(g), Some(values.as_slice().into())];
                    optimizer.step(&mut [p, wide.as_mut_slice().into()], &gradients).unwrap();
                }
                let p = RawTensor { ptr: narrow.as_mut_ptr().cast(), len, dtype: parameter, strides: None };
                // SAFETY: as above.
                let mut p = unsafe { TensorMut::from_raw(p) };
                optimizer.sync(&mut [(0, &mut p), (1, &mut wide.as_mut_slice().into())]).unwrap();
                let narrow: Vec<u8> = narrow.iter().flat_map(|word| word.to_le_bytes()).take(bytes).collect();
                results.push((narrow, wide));
            }
            let what = format!("{parameter} with {gradient}, resident {resident}");
            if software {
                assert!(results[0].0 == results[1].0, "{what}");
            }
            compare(software, &results[0].1, &results[1].1, &what);
            compare_state(software, &mut both, &what);
        }
    }
}

#[test]
fn every_half_precision_number_survives_the_way_through_the_device() {
    let Some(software) = software() else { return };
    for dtype in [Dtype::F16, Dtype::BF16] {
        let mut sgd = Optimizer::gpu("SGD", &Options::default(), &request()).unwrap();
        let info = ParamInfo { resident: true, ..ParamInfo::vector("w", 1 << 16, dtype) };
        sgd.add_group(&[("lr", Value::Float(0.0))], vec![info]).unwrap();
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let (mut bytes, mut zeros) = (aligned(&all), aligned(&vec![0; all.len()]));
        let tensor =
            |words: &mut Vec<u64>| RawTensor { ptr: words.as_mut_ptr().cast(), len: 1 << 16, dtype, strides: None };
        // SAFETY: both arrays live through the calls and do not overlap.
        let (mut p, g) =
            unsafe { ([TensorMut::from_raw(tensor(&mut bytes))], TensorRef::from_raw(tensor(&mut zeros))) };
        sgd.step(&mut p, &[Some(g)]).unwrap();
        let [mut p] = p;
        sgd.sync(&mut [(0, &mut p)]).unwrap();
        let got: Vec<u8> = bytes.iter().flat_map(|word| word.to_le_bytes()).collect();
        for (i, (want, got)) in all.as_chunks::<2>().0.iter().zip(got.as_chunks::<2>().0).enumerate() {
            let value = |b: &[u8; 2]| match dtype {
                Dtype::F16 => half::f16::from_le_bytes(*b).to_f32(),
                _ => half::bf16::from_le_bytes(*b).to_f32(),
            };
            let (want_value, got_value) = (value(want), value(got));
            // A device may flush subnormal float32 numbers, which bfloat16 has, too.
            let flushed = !software && want_value.abs() < f32::MIN_POSITIVE && got_value == 0.0;
            let same = want == got || (want_value.is_nan() && got_value.is_nan()) || flushed;
            assert!(same, "{dtype} {i:#x}: {want_value} became {got_value}");
        }
    }
}

fn guarded(nonfinite: Nonfinite, clip_norm: Option<f64>, clip_value: Option<f64>) -> Options {
    Options { guard: Guard { clip_norm, clip_value, nonfinite }, ..Options::default() }
}

#[test]
fn the_device_clips_and_skips_as_the_cpu_does() {
    let Some(software) = software() else { return };
    let clips =
        [(Some(0.7), None), (Some(2.0), Some(0.3)), (None, Some(0.1)), (Some(f64::INFINITY), None), (None, None)];
    for (clip_norm, clip_value) in clips {
        for resident in [false, true] {
            let options = guarded(Nonfinite::Skip, clip_norm, clip_value);
            // With larger workgroups, too, and without mapped memory.
            let request = DeviceRequest { minimum_limits: resident, ..request() };
            let mut both =
                [Optimizer::cpu("AdamW", &options).unwrap(), Optimizer::gpu("AdamW", &options, &request).unwrap()];
            both[1].force_gpu(256, 100);
            let mut values = [start(), start()];
            for (optimizer, values) in both.iter_mut().zip(&mut values) {
                optimizer.add_group(&[], infos(0..4, resident)).unwrap();
                optimizer.add_group(&[("lr", Value::Float(0.1))], infos(4..7, resident)).unwrap();
                for at in 0..8 {
                    let mut gradients = gradients(at);
                    if at % 3 == 0 {
                        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 2 + at / 6];
                        if let Some(g) = gradients[6].as_mut() {
                            g[at * 37] = bad;
                        }
                    }
                    step(optimizer, values, &gradients).unwrap();
                }
                optimizer.settle().unwrap();
            }
            let norms = both.each_mut().map(|o| o.gradient_norm().unwrap());
            match norms {
                [Some(want), Some(got)] => assert!((want - got).abs() <= 1e-13 * want, "{want} against {got}"),
                other => assert_eq!(other, [None, None]),
            }
            let counts = both.each_ref().map(|o| (o.skip_count(), o.update_count()));
            assert!(counts[0] == counts[1] && counts[0].0 > 0, "{counts:?}");
            for (i, values) in values[1].iter_mut().enumerate() {
                both[1].sync(&mut [(i, &mut values.as_mut_slice().into())]).unwrap();
            }
            for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
                compare(software, want, got, &format!("{clip_norm:?} {clip_value:?} resident {resident}: {i}"));
            }
            compare_state(software, &mut both, "AdamW");
        }
    }
}

#[test]
fn a_refused_gradient_on_the_device_is_reported_by_the_next_call_and_changes_nothing() {
    if software().is_none() {
        return;
    }
    for (resident, waits) in [(true, false), (true, true), (false, false)] {
        let options = Options { nonfinite_sync: waits, ..guarded(Nonfinite::Raise, Some(1.0), None) };
        let mut adam = Optimizer::gpu("NAdam", &options, &request()).unwrap();
        adam.add_group(&[], infos(0..7, resident)).unwrap();
        let mut values = start();
        step(&mut adam, &mut values, &gradients(0)).unwrap();
        let (before, before_values) = (adam.state_dict().unwrap(), values.clone());
        let mut bad = gradients(4);
        bad[5].as_mut().unwrap()[999] = f32::NAN;
        bad[6].as_mut().unwrap()[0] = f32::INFINITY;
        let stepped = step(&mut adam, &mut values, &bad);
        let reported = if resident && !waits {
            stepped.and_then(|()| step(&mut adam, &mut values, &gradients(1)))
        } else {
            stepped
        };
        let error = reported.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Nonfinite);
        // The place is known where the gradient is still at hand.
        let place = if resident && !waits { "" } else { " at flat index 999" };
        let text = format!(
            "NAdam.step: gradient of parameter \"p5\" must be finite, got NaN{place}; nonfinite=\"skip\" leaves such updates out"
        );
        assert_eq!(error.to_string(), text);
        assert_eq!(adam.state_dict().unwrap(), before);
        assert_eq!(values, before_values);
        step(&mut adam, &mut values, &gradients(1)).unwrap();
        assert_eq!(adam.state_dict().unwrap().update_count, 2);
    }
}

#[test]
fn norms_are_the_cpus_whatever_the_magnitudes() {
    let Some(software) = software() else { return };
    let cases: Vec<Vec<f32>> = vec![
        vec![3.0, 4.0],
        vec![0.0; 5000],
        vec![1e19; 128],
        vec![1e-30; 10_000],
        vec![f32::MAX; 3],
        vec![1e-44, 1e-40],
        (0..9000).map(|i| if i % 2 == 0 { 1e15 } else { 1e-15 }).collect(),
        (0..4097).map(|i| (i as f32).sin() * 10f32.powi(i % 70 - 35)).collect(),
        vec![f32::INFINITY, 1.0],
        vec![1.0, f32::NAN],
        vec![],
    ];
    for (k, g) in cases.iter().enumerate() {
        for max_norm in [0.0, 1e-300, 1e-20, 1e-3, 1.0, 5.0, 1e30, 1e300, f64::INFINITY] {
            let options = guarded(Nonfinite::Propagate, Some(max_norm), None);
            let mut both =
                [Optimizer::cpu("SGD", &options).unwrap(), Optimizer::gpu("SGD", &options, &request()).unwrap()];
            let results = both.each_mut().map(|optimizer| {
                optimizer
                    .add_group(&[("lr", Value::Float(1.0))], vec![ParamInfo::vector("w", g.len(), Dtype::F32)])
                    .unwrap();
                let mut w = vec![vec![0.0f32; g.len()]];
                step(optimizer, &mut w, &[Some(g.clone())]).unwrap();
                (optimizer.gradient_norm().unwrap().unwrap(), w.remove(0))
            });
            let [(want, w), (got, v)] = &results;
            let close = (want - got).abs() <= 1e-13 * want || want.is_nan() && got.is_nan() || want == got;
            // Subnormal numbers scale to normal ones on a device that keeps them.
            assert!(close || k == 5, "case {k}, {max_norm:e}: {want:e} against {got:e}");
            for (a, b) in w.iter().zip(v) {
                // A factor below the smallest normal number is rounded twice.
                let gap = (f64::from(*a) - f64::from(*b)).abs();
                let close = a == b || a.is_nan() && b.is_nan() || gap <= 2f64.powi(-22) * f64::from(a.abs());
                // Hardware may take such a factor for zero.
                let vanishes = !software && max_norm / want < f64::from(f32::MIN_POSITIVE) && *b == 0.0;
                assert!(
                    close || vanishes || a.abs() < f32::MIN_POSITIVE,
                    "case {k}, {max_norm:e}: {a:e} against {b:e}"
                );
            }
        }
    }
}

fn array(values: &[f32]) -> Arc<gpu::Array> {
    let array = gpu::Array::zeros("test", &request(), Dtype::F32, values.len()).unwrap();
    array.write("test", None, &values.into()).unwrap();
    Arc::new(array)
}

#[test]
fn gradients_that_lie_on_the_device() {
    let Some(software) = software() else { return };
    // Below and above what is worth a dispatch of its own, and beyond a window.
    for len in [1, 1000, 70_000, 200_003] {
        let mut both = optimizers("AdamW");
        both[1].force_gpu(1 << 16, 4096);
        let (mut want, mut got) = (vec![numbers(1, len), numbers(2, 77)], vec![numbers(1, len), numbers(2, 77)]);
        for optimizer in &mut both {
            let infos = [("w", len), ("b", 77)].map(|(name, n)| ParamInfo::vector(name, n, Dtype::F32));
            optimizer.add_group(&[], infos.to_vec()).unwrap();
        }
        for at in 0..4 {
            let (g, b) = (numbers(10 + at, len), numbers(20 + at, 77));
            step(&mut both[0], &mut want, &[Some(g.clone()), Some(b.clone())]).unwrap();
            let held = array(&g);
            let mut back = vec![0.0f32; len];
            held.read("test", None, &mut back.as_mut_slice().into()).unwrap();
            assert_eq!(
                back.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                g.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            );
            let gradients = [Some(held.as_gradient()), Some(b.as_slice().into())];
            let mut params: Vec<TensorMut<'_>> = got.iter_mut().map(|v| v.as_mut_slice().into()).collect();
            both[1].step(&mut params, &gradients).unwrap();
        }
        for (want, got) in want.iter().zip(&got) {
            compare(software, want, got, &format!("{len} elements"));
        }
        let error =
            step_with(&mut both[0], &mut want, &[Some(array(&numbers(1, len)).as_gradient()), None]).unwrap_err();
        assert!(error.to_string().ends_with("must be in the host's memory, got one on a device"), "{error}");
    }
}

fn step_with(
    optimizer: &mut Optimizer,
    values: &mut [Vec<f32>],
    gradients: &[Option<TensorRef<'_>>],
) -> roptim::Result<()> {
    let mut params: Vec<TensorMut<'_>> = values.iter_mut().map(|v| v.as_mut_slice().into()).collect();
    optimizer.step(&mut params, gradients)
}

#[test]
fn clipping_on_the_device_is_the_cpus() {
    let Some(software) = software() else { return };
    let values = [numbers(1, 5000), numbers(2, 70_001), vec![], numbers(3, 1)];
    let arrays: Vec<_> = values.iter().map(|v| array(v)).collect();
    let norm = gpu::clip_norm("test", &arrays, Some(0.5)).unwrap().value("test").unwrap();
    let want = values.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    assert!((norm / want - 1.0).abs() < 1e-12, "{norm} against {want}");
    let factor = (0.5 / (want + 1e-6)) as f32;
    for (values, array) in values.iter().zip(&arrays) {
        let want: Vec<f32> = values.iter().map(|x| x * factor).collect();
        let mut got = vec![0.0; values.len()];
        array.read("test", None, &mut got.as_mut_slice().into()).unwrap();
        compare(software, &want, &got, "clipped");
    }
    assert_eq!(gpu::clip_norm("test", &arrays[2..3], Some(0.5)).unwrap().value("test").unwrap(), 0.0);
}

#[test]
fn sums_of_gradients_are_those_of_the_cpu() {
    let Some(software) = software() else { return };
    let mut both = optimizers("AdamW");
    both[1].force_gpu(256, 64);
    let mut values = [start(), start()];
    for (optimizer, values) in both.iter_mut().zip(&mut values) {
        optimizer.add_group(&[], infos(0..7, true)).unwrap();
        for round in 0..3 {
            for at in 0..4 {
                let gradients = gradients(10 * round + at);
                let gradients: Vec<_> = gradients.iter().map(|g| g.as_ref().map(|g| g.as_slice().into())).collect();
                optimizer.accumulate(&gradients).unwrap();
            }
            let mut params: Vec<TensorMut<'_>> = values.iter_mut().map(|v| v.as_mut_slice().into()).collect();
            assert!(optimizer.has_sums());
            optimizer.step_accumulated(&mut params, Default::default()).unwrap();
            assert!(!optimizer.has_sums());
        }
        for (i, values) in values.iter_mut().enumerate() {
            optimizer.sync(&mut [(i, &mut values.as_mut_slice().into())]).unwrap();
        }
        let short = vec![0.0f32; 2];
        let mut wrong = vec![None; 7];
        wrong[4] = Some(short.as_slice().into());
        assert_eq!(optimizer.accumulate(&wrong).unwrap_err().kind(), ErrorKind::Value);
        assert!(!optimizer.has_sums());
    }
    for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
        compare(software, want, got, &format!("parameter {i}"));
    }
    compare_state(software, &mut both, "AdamW");
}

#[test]
fn a_lost_device_is_recovered_with_parameters_and_state_or_not_at_all() {
    let Some(software) = software() else { return };
    for resident in [true, false] {
        for state_first in [true, false] {
            let alone = DeviceRequest { alone: true, ..request() };
            let options = Options::default();
            let mut both =
                [Optimizer::cpu("AdamW", &options).unwrap(), Optimizer::gpu("AdamW", &options, &alone).unwrap()];
            let mut values = [start(), start()];
            for (optimizer, values) in both.iter_mut().zip(&mut values) {
                optimizer.add_group(&[], infos(0..7, resident)).unwrap();
                (0..3).for_each(|at| step(optimizer, values, &gradients(at)).unwrap());
                for (i, values) in values.iter_mut().enumerate() {
                    optimizer.sync(&mut [(i, &mut values.as_mut_slice().into())]).unwrap();
                }
            }
            let [cpu, gpu] = &mut both;
            let (saved, kept) = (gpu.state_dict().unwrap(), values[1].clone());
            step(gpu, &mut values[1], &gradients(3)).unwrap();
            gpu.force_loss();
            let error = step(gpu, &mut values[1], &gradients(4)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DeviceLost, "{error}");
            assert!(gpu.is_torn());
            assert_eq!(step(gpu, &mut values[1], &gradients(4)).unwrap_err().kind(), ErrorKind::Torn);
            let give = |gpu: &mut Optimizer, values: &mut Vec<Vec<f32>>| {
                *values = kept.clone();
                (0..7).for_each(|i| gpu.host_written(i));
            };
            if resident {
                let lost = gpu.sync(&mut [(3, &mut values[1][3].as_mut_slice().into())]);
                assert!(matches!(lost, Err(e) if e.kind() == ErrorKind::DeviceLost));
            }
            if state_first {
                gpu.load_state_dict(&saved).unwrap();
                if resident {
                    let error = step(gpu, &mut values[1], &gradients(3)).unwrap_err();
                    assert!(error.to_string().contains("was lost with the device"), "{error}");
                }
                give(gpu, &mut values[1]);
            } else {
                give(gpu, &mut values[1]);
                assert_eq!(step(gpu, &mut values[1], &gradients(3)).unwrap_err().kind(), ErrorKind::Torn);
                gpu.load_state_dict(&saved).unwrap();
            }
            for at in 3..6 {
                step(cpu, &mut values[0], &gradients(at)).unwrap();
                step(gpu, &mut values[1], &gradients(at)).unwrap();
            }
            for (i, values) in values[1].iter_mut().enumerate() {
                gpu.sync(&mut [(i, &mut values.as_mut_slice().into())]).unwrap();
            }
            for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
                compare(software, want, got, &format!("parameter {i}"));
            }
            compare_state(software, &mut both, "AdamW");
        }
    }
}

#[test]
fn memory_that_the_device_lacks_is_missed_before_anything_is_registered() {
    if software().is_none() {
        return;
    }
    let mut adam = Optimizer::gpu("Adam", &Options::default(), &request()).unwrap();
    adam.add_group(&[], vec![ParamInfo::vector("w", 3, Dtype::F32)]).unwrap();
    let before = adam.device_bytes();
    let error = adam.add_group(&[], vec![ParamInfo::vector("huge", 1 << 36, Dtype::F32)]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::OutOfMemory | ErrorKind::Device), "{error}");
    assert_eq!((adam.entries().len(), adam.groups().len(), adam.device_bytes()), (1, 1, before));
    step(&mut adam, &mut [vec![1.0, 2.0, 3.0]], &[Some(vec![1.0; 3])]).unwrap();
}

#[test]
fn ten_thousand_tensors_in_two_thousand_groups() {
    let Some(software) = software() else { return };
    const GROUPS: usize = 2_000;
    let mut both = optimizers("AdamW");
    let lengths: Vec<usize> = (0..5 * GROUPS).map(|i| i % 13).collect();
    let mut results = both.each_mut().map(|optimizer| {
        for group in 0..GROUPS {
            let info = |i: usize| ParamInfo::vector(&format!("p{i}"), lengths[i], Dtype::F32);
            let hypers = [("lr", Value::Float(1e-3 * (1.0 + group as f64)))];
            optimizer.add_group_without_memory(&hypers, (5 * group..5 * group + 5).map(info).collect()).unwrap();
        }
        optimizer.reserve().unwrap();
        let mut values: Vec<Vec<f32>> = lengths.iter().enumerate().map(|(i, &n)| numbers(i as u64, n)).collect();
        for at in 0..2 {
            let g: Vec<_> = lengths.iter().enumerate().map(|(i, &n)| Some(numbers(7 * i as u64 + at, n))).collect();
            step(optimizer, &mut values, &g).unwrap();
        }
        values.concat()
    });
    let got = results[1].split_off(0);
    compare(software, &results[0], &got, "all");
}

/// Numbers of one storage type.
struct Stored {
    dtype: Dtype,
    words: Vec<u64>,
    len: usize,
}

impl Stored {
    /// Rounded to the type.
    fn new(dtype: Dtype, values: &[f32]) -> Self {
        Self { dtype, words: aligned(&stored(dtype, values)), len: values.len() }
    }

    fn raw(&mut self) -> RawTensor {
        RawTensor { ptr: self.words.as_mut_ptr().cast(), len: self.len, dtype: self.dtype, strides: None }
    }

    fn values(&self) -> Vec<f32> {
        let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let halves = bytes.as_chunks::<2>().0.iter();
        let all: Vec<f32> = match self.dtype {
            Dtype::F16 => halves.map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => halves.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => floats(&bytes),
        };
        all[..self.len].to_vec()
    }

    /// One unit in the last place, relative.
    fn unit(&self) -> f64 {
        match self.dtype {
            Dtype::F16 => 2f64.powi(-10),
            Dtype::BF16 => 2f64.powi(-7),
            _ => 0.0,
        }
    }
}

fn step_stored(optimizer: &mut Optimizer, values: &mut [Stored], gradients: &mut [Option<Stored>]) {
    // SAFETY: the arrays live through the call, are of the length and dtype they name, and do not overlap.
    let (mut params, gradients): (Vec<TensorMut<'_>>, Vec<Option<TensorRef<'_>>>) = unsafe {
        (
            values.iter_mut().map(|v| TensorMut::from_raw(v.raw())).collect(),
            gradients.iter_mut().map(|g| g.as_mut().map(|g| TensorRef::from_raw(g.raw()))).collect(),
        )
    };
    optimizer.step(&mut params, &gradients).unwrap();
}

/// Shapes and hyperparameters of the tensor rules, wider than the registry's tests have them.
fn tensor_cases(name: &str) -> (Vec<Vec<usize>>, Vec<Hypers>) {
    let matrices = [[1, 1], [1, 70], [70, 1], [3, 5], [64, 64], [65, 129], [300, 70]].map(Vec::from);
    if name == "Muon" {
        let of = |changes: &[(&'static str, Value)]| changes.to_vec();
        let variants = vec![
            of(&[]),
            of(&[("nesterov", Value::Bool(false)), ("weight_decay", Value::Float(0.0))]),
            of(&[("ns_steps", Value::Int(0))]),
            of(&[("ns_steps", Value::Int(2)), ("adjust_lr_fn", Value::Choice(Choice::MatchRmsAdamw))]),
            of(&[("eps", Value::Float(1e3)), ("momentum", Value::Float(0.4))]),
        ];
        return (matrices.into(), variants);
    }
    let mut shapes: Vec<Vec<usize>> = matrices.into();
    shapes.extend([&[][..], &[1], &[5000], &[0], &[3, 0], &[4, 30, 20], &[2, 3, 130, 2], &[2, 1, 5]].map(Vec::from));
    let eps = Value::Pair([1e-10, 0.05]);
    let all = [
        ("beta2_decay", Value::Float(-0.5)),
        ("d", Value::Float(1.5)),
        ("eps", eps),
        ("weight_decay", Value::Float(0.1)),
        ("maximize", Value::Bool(true)),
    ];
    let mut variants: Vec<Hypers> = all.iter().map(|&one| vec![one]).collect();
    variants.extend([vec![], all.to_vec()]);
    (shapes, variants)
}

#[test]
fn tensor_rules_agree_over_shapes_types_and_variants() {
    let Some(software) = software() else { return };
    for name in ["Adafactor", "Muon"] {
        let (shapes, variants) = tensor_cases(name);
        let (mut worst, mut different, mut all) = (0f64, [0; 2], [0; 2]);
        for (hypers, dtype) in variants.iter().flat_map(|h| [Dtype::F32, Dtype::F16, Dtype::BF16].map(|d| (h, d))) {
            let draw = |seed: u64, i: usize| {
                let n = shapes[i].iter().product();
                Stored::new(
                    dtype,
                    &numbers(seed, n).into_iter().map(|x| if x == 3e4 { 3.0 } else { x }).collect::<Vec<_>>(),
                )
            };
            let mut both = optimizers(name);
            let mut values = [0, 1].map(|_| (0..shapes.len()).map(|i| draw(i as u64 + 1, i)).collect::<Vec<_>>());
            for optimizer in &mut both {
                let info = |shape: &Vec<usize>| ParamInfo { name: None, shape: shape.clone(), dtype, resident: false };
                let hypers: Hypers = hypers.iter().copied().chain([("lr", Value::Float(0.02))]).collect();
                optimizer.add_group(&hypers, shapes.iter().map(info).collect()).unwrap();
            }
            for at in 0..10 {
                for (optimizer, values) in both.iter_mut().zip(&mut values) {
                    let one = |i: usize| has_gradient(i, at).then(|| draw((100 * at + i) as u64, i));
                    step_stored(optimizer, values, &mut (0..shapes.len()).map(one).collect::<Vec<_>>());
                }
            }
            for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
                let what = format!("{name} {hypers:?} {dtype} {:?}", shapes[i]);
                let (w, g) = (want.values(), got.values());
                compare_within(tolerance(name, software) + want.unit(), &w, &g, &what);
                let kind = usize::from(dtype != Dtype::F32);
                different[kind] += w.iter().zip(&g).filter(|(w, g)| w.to_bits() != g.to_bits()).count();
                all[kind] += w.len();
                if dtype == Dtype::F32 && !w.is_empty() {
                    let mean = w.iter().map(|x| f64::from(x.abs())).sum::<f64>() / w.len() as f64;
                    let error = |(&w, &g): (&f32, &f32)| f64::from((w - g).abs()) / f64::from(w.abs()).max(mean);
                    worst = w.iter().zip(&g).map(error).fold(worst, f64::max);
                }
            }
            compare_state(software, &mut both, &format!("{name} {hypers:?} {dtype}"));
        }
        eprintln!(
            "{name}: at most {worst:.1e}; {} of {} float32, {} of {} halves differ",
            different[0], all[0], different[1], all[1]
        );
        // A half-precision number goes another way where the sum before its rounding is close to the middle.
        assert!(different[1] * 100 <= all[1], "{name}: {} of {} halves differ", different[1], all[1]);
    }
}

#[test]
fn tensor_rules_are_clipped_and_skipped() {
    let Some(software) = software() else { return };
    for name in ["Adafactor", "Muon"] {
        let guard = Guard { clip_norm: Some(0.5), clip_value: Some(0.75), nonfinite: Nonfinite::Skip };
        let options = Options { guard, ..Options::default() };
        let mut both = [Optimizer::cpu(name, &options).unwrap(), Optimizer::gpu(name, &options, &request()).unwrap()];
        let mut values = [start_of(name), start_of(name)];
        let mut norms = [const { Vec::new() }; 2];
        for ((optimizer, values), norms) in both.iter_mut().zip(&mut values).zip(&mut norms) {
            optimizer.add_group(&[], infos_of(name, 0..7, false)).unwrap();
            for at in 0..6 {
                let mut gradients = gradients_of(name, at);
                let before = values.clone();
                if at == 0 || at == 3 {
                    gradients[1] = Some(vec![f32::NAN; 15]);
                }
                step(optimizer, values, &gradients).unwrap();
                norms.push(optimizer.gradient_norm().unwrap().unwrap());
                optimizer.settle().unwrap();
                assert_eq!(*values == before, at == 0 || at == 3, "{name} {at}");
            }
            assert_eq!((optimizer.skip_count(), optimizer.update_count()), (2, 4));
        }
        for (want, got) in norms[0].iter().zip(&norms[1]) {
            assert!(want.is_nan() && got.is_nan() || (want - got).abs() <= 1e-13 * want, "{want} against {got}");
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare_within(tolerance(name, software), want, got, &format!("{name} parameter {i}"));
        }
        compare_state(software, &mut both, name);
    }
}

#[test]
fn sums_of_squares_neither_overflow_nor_vanish() {
    let Some(software) = software() else { return };
    let scales = [1e-20f32, 1e-12, 1.0, 1e12, 1e18];
    let plain = |seed: u64, scale: f32| {
        // Muon blows up what rounding leaves in directions that a matrix does not have: these have all.
        numbers(seed + 50, 150).into_iter().map(|x| scale * x.clamp(-1.0, 1.0)).collect::<Vec<_>>()
    };
    for (name, of_gradients) in ["Adafactor", "Muon"].into_iter().flat_map(|name| [(name, scales), (name, [1.0; 5])]) {
        let mut both = optimizers(name);
        let group: Hypers = match name {
            "Adafactor" => vec![("eps", Value::Pair([0.0, 0.0]))],
            _ => vec![("eps", Value::Float(0.0))],
        };
        let mut values = [0, 1].map(|_| scales.iter().map(|&scale| plain(7, scale)).collect::<Vec<_>>());
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            let info = ParamInfo { name: None, shape: vec![30, 5], dtype: Dtype::F32, resident: false };
            optimizer.add_group(&group, vec![info; scales.len()]).unwrap();
            for at in 0..3 {
                let gradients = of_gradients.iter().rev().map(|&scale| Some(plain(at, scale)));
                step(optimizer, values, &gradients.collect::<Vec<_>>()).unwrap();
            }
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            // Products of Adafactor's means leave float32's range before their squares' sums do.
            let is_plain = name == "Muon" || of_gradients[0] == 1.0;
            assert!(!is_plain || want.iter().all(|x| x.is_finite()), "{name} {i}");
            compare_within(tolerance(name, software), want, got, &format!("{name} {}", scales[i]));
        }
        compare_state(software, &mut both, name);
    }
}

#[test]
fn long_lines_are_added_up_in_pieces() {
    let Some(software) = software() else { return };
    // Rows of more than 4096 pieces of 128, and more terms than the rounds that a software adapter lets loops run.
    for (name, shapes) in
        [("Adafactor", [[1, 600_000], [600_000, 1], [2, 70_000]]), ("Muon", [[1, 70_000], [70_000, 1], [9, 8193]])]
    {
        let mut both = optimizers(name);
        let lengths = shapes.map(|[rows, columns]| rows * columns);
        let plain = |seed: u64, n: usize| numbers(seed, n).into_iter().map(|x| x.clamp(-1.0, 1.0)).collect::<Vec<_>>();
        let mut values = [0, 1].map(|_| lengths.map(|n| plain(n as u64, n)).to_vec());
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            let info =
                |shape: [usize; 2]| ParamInfo { name: None, shape: shape.into(), dtype: Dtype::F32, resident: false };
            optimizer.add_group(&[], shapes.map(info).into()).unwrap();
            for at in 0..2 {
                step(optimizer, values, &lengths.map(|n| Some(plain(at + n as u64 + 9, n)))).unwrap();
            }
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare_within(tolerance(name, software), want, got, &format!("{name} {:?}", shapes[i]));
        }
        compare_state(software, &mut both, name);
    }
}

#[test]
fn muon_iterates_as_often_as_each_group_says() {
    let Some(software) = software() else { return };
    let mut both = optimizers("Muon");
    let mut values = [start_of("Muon"), start_of("Muon")];
    for (optimizer, values) in both.iter_mut().zip(&mut values) {
        optimizer.add_group(&[("ns_steps", Value::Int(1))], infos_of("Muon", 0..3, false)).unwrap();
        optimizer.add_group(&[("ns_steps", Value::Int(4))], infos_of("Muon", 3..7, false)).unwrap();
        step(optimizer, values, &gradients_of("Muon", 0)).unwrap();
        optimizer.set_hypers(0, &[("ns_steps", Value::Int(5))]).unwrap();
        step(optimizer, values, &gradients_of("Muon", 0)).unwrap();
        optimizer.set_hypers(1, &[("ns_steps", Value::Int(0))]).unwrap();
        step(optimizer, values, &gradients_of("Muon", 4)).unwrap();
    }
    for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
        compare_within(tolerance("Muon", software), want, got, &format!("parameter {i}"));
    }
}

#[test]
fn tensor_rules_take_gradients_from_the_device() {
    let Some(software) = software() else { return };
    // One long enough for a dispatch of its own, one copied beside the others, one added up on the device.
    let shapes = [[300, 230], [30, 23], [17, 9]];
    for name in ["Adafactor", "Muon"] {
        let mut both = optimizers(name);
        let lengths = shapes.map(|[rows, columns]| rows * columns);
        let mut values = [0, 1].map(|_| lengths.map(|n| numbers(n as u64, n)).to_vec());
        for optimizer in &mut both {
            let info =
                |shape: [usize; 2]| ParamInfo { name: None, shape: shape.into(), dtype: Dtype::F32, resident: true };
            optimizer.add_group(&[], shapes.map(info).into()).unwrap();
        }
        let [cpu, gpu] = &mut both;
        for at in 0..2u64 {
            let gradients: Vec<Vec<f32>> = lengths.iter().map(|&n| numbers(at + n as u64 + 9, n)).collect();
            step(cpu, &mut values[0], &gradients.iter().cloned().map(Some).collect::<Vec<_>>()).unwrap();
            let on_device = gradients.iter().map(|g| {
                let array = Arc::new(gpu::Array::zeros("test", &request(), Dtype::F32, g.len()).unwrap());
                array.write("test", None, &g.as_slice().into()).unwrap();
                Some(array.as_gradient())
            });
            let on_device: Vec<Option<TensorRef<'_>>> = on_device.collect();
            let mut params: Vec<TensorMut<'_>> = values[1].iter_mut().map(|v| v.as_mut_slice().into()).collect();
            if at == 0 {
                gpu.step(&mut params, &on_device).unwrap();
            } else {
                gpu.accumulate(&on_device).unwrap();
                gpu.step_accumulated(&mut params, Default::default()).unwrap();
            }
        }
        let [on_cpu, on_gpu] = &mut values;
        for (i, (want, got)) in on_cpu.iter().zip(on_gpu).enumerate() {
            both[1].sync(&mut [(i, &mut got.as_mut_slice().into())]).unwrap();
            compare_within(tolerance(name, software), want, got, &format!("{name} parameter {i}"));
        }
        compare_state(software, &mut both, name);
    }
}

#[test]
fn a_tensor_that_no_window_holds_is_refused_by_name() {
    if software().is_none() {
        return;
    }
    let refused = |name: &str, window: usize, shape: &[usize]| {
        let mut gpu = Optimizer::gpu(name, &Options::default(), &request()).unwrap();
        gpu.force_gpu(window, 4);
        let info = |shape: &[usize]| ParamInfo {
            name: Some("w".into()),
            shape: shape.into(),
            dtype: Dtype::F32,
            resident: false,
        };
        gpu.add_group(&[], vec![info(&[2, 3])]).unwrap();
        let error = gpu.add_group(&[], vec![info(&[1, 1]), info(shape)]).unwrap_err();
        assert_eq!((error.kind(), gpu.entries().len(), gpu.groups().len()), (ErrorKind::Value, 1, 1));
        step(&mut gpu, &mut [vec![1.0; 6]], &[Some(vec![0.5; 6])]).unwrap();
        error.to_string()
    };
    assert_eq!(
        refused("Adafactor", 64, &[65]),
        "Adafactor: parameter \"w\" must be of at most 64 elements on this GPU, got 65; use backend=\"cpu\" for it"
    );
    assert_eq!(
        refused("Adafactor", 64, &[8, 8]),
        "Adafactor: parameter \"w\" must be of at most 256 bytes of working memory on this GPU, got shape (8, 8), which \
         needs 532; use backend=\"cpu\" for it"
    );
    assert_eq!(
        refused("Muon", 128, &[2, 65]),
        "Muon: parameter \"w\" must be of at most 128 elements on this GPU, got 130; use backend=\"cpu\" for it"
    );
}
