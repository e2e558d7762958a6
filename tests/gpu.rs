//! Whole steps, CPU against GPU, for every optimizer of the registry.
//!
//! On a software adapter parameters and slots must agree bit for bit. A hardware adapter may fuse a
//! multiplication with an addition and may be 2.5 ulp off in a division and a square root, so there the
//! measure is `|Δ| / max(|want|, mean |want|)`, at most [`HARDWARE_TOLERANCE`] after ten steps.
//!
//! Without an adapter the tests print a line and pass; `ROPTIM_REQUIRE_GPU=1` makes them fail.

#![cfg(feature = "gpu")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

use std::sync::Arc;

use roptim::gpu::{self, DeviceRequest};
use roptim::tensor::{RawTensor, Strides};
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, Preset, REGISTRY, Range, TensorMut, TensorRef, Value};

/// A few ulp in each of ten steps; a step changes parameters by about 1e-2 of their size.
const HARDWARE_TOLERANCE: f64 = 1e-5;

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

/// Numbers in about [−1, 1], with both zeros, subnormal, tiny and large ones among them.
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let special = [0.0, -0.0, 1e-41, -3e-39, 1e-20, -1e-12, 3e4, f32::MIN_POSITIVE];
    (0..len).map(|i| if i % 23 == 7 { special[(i / 23) % special.len()] } else { draw() }).collect()
}

fn compare(software: bool, want: &[f32], got: &[f32], what: &str) {
    assert_eq!(want.len(), got.len(), "{what}");
    let mean = want.iter().map(|x| f64::from(x.abs())).sum::<f64>() / want.len().max(1) as f64;
    for (i, (&w, &g)) in want.iter().zip(got).enumerate() {
        let (wide, narrow) = (f64::from(w), f64::from(g));
        let close = if software {
            w.to_bits() == g.to_bits()
        } else {
            w.is_nan() && g.is_nan() || w == g || (wide - narrow).abs() <= HARDWARE_TOLERANCE * wide.abs().max(mean)
        };
        assert!(close, "{what}[{i}]: the CPU has {w:e} ({:#x}), the GPU {g:e} ({:#x})", w.to_bits(), g.to_bits());
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn compare_state(software: bool, optimizers: &[Optimizer; 2], what: &str) {
    let [cpu, gpu] = optimizers.each_ref().map(|o| o.state_dict().unwrap());
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
                (Some(want), Some(got)) => compare(software, &floats(&want.bytes), &floats(&got.bytes), &what),
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

fn infos(range: std::ops::Range<usize>, resident: bool) -> Vec<ParamInfo> {
    let info = |i: usize| ParamInfo { resident, ..ParamInfo::vector(&format!("p{i}"), LENGTHS[i], Dtype::F32) };
    range.map(info).collect()
}

fn step(optimizer: &mut Optimizer, values: &mut [Vec<f32>], gradients: &[Option<Vec<f32>>]) -> roptim::Result<()> {
    let gradients: Vec<Option<TensorRef<'_>>> =
        gradients.iter().map(|g| g.as_ref().map(|g| g.as_slice().into())).collect();
    let mut params: Vec<TensorMut<'_>> = values.iter_mut().map(|v| v.as_mut_slice().into()).collect();
    optimizer.step(&mut params, &gradients)
}

fn start() -> Vec<Vec<f32>> {
    LENGTHS.iter().enumerate().map(|(i, &n)| numbers(i as u64 + 1, n)).collect()
}

fn gradients(at: usize) -> Vec<Option<Vec<f32>>> {
    let one = |i: usize| has_gradient(i, at).then(|| numbers((100 * at + i) as u64, LENGTHS[i]));
    (0..LENGTHS.len()).map(one).collect()
}

/// Ten steps of both backends, and everything compared.
fn run(name: &str, hypers: &[(&str, Value)], adapt: impl FnOnce(&mut Optimizer)) {
    let Some(software) = software() else { return };
    let mut both = optimizers(name);
    adapt(&mut both[1]);
    for optimizer in &mut both {
        optimizer.add_group(hypers, infos(0..4, false)).unwrap();
        optimizer.add_group(&[("lr", Value::Float(0.005))], infos(4..7, false)).unwrap();
    }
    let mut values = [start(), start()];
    for at in 0..10 {
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            step(optimizer, values, &gradients(at)).unwrap();
        }
        let what = format!("{name} {hypers:?} step {at}");
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare(software, want, got, &format!("{what}: parameter {i}"));
        }
    }
    compare_state(software, &both, &format!("{name} {hypers:?}"));
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
        for (window, chunk) in [(64, 4), (128, 60), (1024, 4096)] {
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
    compare_state(software, &both, "SGD");
}

#[test]
fn a_slot_that_was_reset_begins_as_zero() {
    let Some(software) = software() else { return };
    for preset in with_shader() {
        let mut both = optimizers(preset.name);
        let mut values = [start(), start()];
        for (optimizer, values) in both.iter_mut().zip(&mut values) {
            optimizer.add_group(&variants(preset).pop().unwrap(), infos(0..7, false)).unwrap();
            (0..3).for_each(|at| step(optimizer, values, &gradients(at)).unwrap());
            optimizer.reset(2).unwrap();
            assert!(!optimizer.has_state(2) && optimizer.slot_keys(2).is_empty());
            (3..6).for_each(|at| step(optimizer, values, &gradients(at)).unwrap());
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare(software, want, got, &format!("{} parameter {i}", preset.name));
        }
        compare_state(software, &both, preset.name);
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
        compare_state(true, &both, &format!("flush_subnormals {flush_subnormals}"));
    }
}

#[test]
fn nan_and_infinity_spread_as_on_the_cpu() {
    let Some(_) = software() else { return };
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
            optimizer.add_group(hypers, vec![ParamInfo::vector("w", 6, Dtype::F32)]).unwrap();
            let bad = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, 1.0, f32::MAX];
            for gradient in [vec![1.0; 6], bad, vec![1.0; 6]] {
                step(optimizer, values, &[Some(gradient)]).unwrap();
            }
        }
        let class = |x: &f32| (x.is_nan(), x.is_infinite(), x.is_finite().then_some(x.to_bits()));
        let classes = |values: &[f32]| values.iter().map(class).collect::<Vec<_>>();
        assert_eq!(classes(&values[0][0]), classes(&values[1][0]), "{name}: {values:?}");
        let states = both.each_ref().map(|o| o.state_dict().unwrap().state.remove(&0));
        let [Some(cpu), Some(gpu)] = states else {
            assert_eq!(states, [None, None], "{name}");
            continue;
        };
        for (key, want) in cpu.slots.iter().filter_map(|(key, want)| Some((key, want.array()?))) {
            let (want, got) = (floats(&want.bytes), floats(&gpu.slots[key].array().unwrap().bytes));
            assert_eq!(classes(&want), classes(&got), "{name} {key}: {want:?} against {got:?}");
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
            gpu.sync(2, &mut values[1][2].as_mut_slice().into()).unwrap();
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
        gpu.sync(i, &mut got.as_mut_slice().into()).unwrap();
        cpu.sync(i, &mut want.as_mut_slice().into()).unwrap();
        assert!(!gpu.host_is_stale(i));
        compare(software, want, got, &format!("resident parameter {i}"));
    }
    let wrong = gpu.sync(1, &mut vec![0.0f32; 2].as_mut_slice().into()).unwrap_err();
    assert_eq!(wrong.to_string(), "AdamW.sync: parameter \"p1\" must be of 3 elements, got 2");
    compare_state(software, &both, "AdamW");
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
        "AdamW: parameter \"w\" must be float32 or complex64 on the GPU, got float64; use backend=\"cpu\" for float64"
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
        plain.sync(0, &mut c_order.as_mut_slice().into()).unwrap();
        // SAFETY: as above.
        strided.sync(0, &mut unsafe { TensorMut::from_raw(transposed(&mut f_order, ROWS, COLUMNS)) }).unwrap();
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
        both[1].force_gpu(256, 4096);
        let mut values = start();
        both[0].add_group(&hypers, infos(0..7, false)).unwrap();
        both[1].add_group(&[], infos(0..7, false)).unwrap();
        (0..5).for_each(|at| step(&mut both[0], &mut values, &gradients(at)).unwrap());
        let saved = both[0].state_dict().unwrap();
        both[1].load_state_dict(&saved).unwrap();
        assert_eq!(both[1].state_dict().unwrap(), saved, "{}", preset.name);
        let mut values = [values.clone(), values];
        for at in 5..10 {
            for (optimizer, values) in both.iter_mut().zip(&mut values) {
                step(optimizer, values, &gradients(at)).unwrap();
            }
        }
        for (i, (want, got)) in values[0].iter().zip(&values[1]).enumerate() {
            compare(software, want, got, &format!("{} parameter {i}", preset.name));
        }
        compare_state(software, &both, preset.name);
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
