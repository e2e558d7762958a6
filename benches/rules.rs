//! Time per element of a step of every optimizer in the registry, by instruction set, on one thread.
//!
//! Elementwise rules step one tensor that stays in the cache, each with every kernel it has: what is measured is
//! arithmetic, not memory. Tensor rules step one matrix. Norms are taken of 1 Mi elements. The names are those of
//! optimizer, kernel, dtype and instruction set, and criterion's filter takes a part of them:
//!
//! ```text
//! cargo bench --bench rules -- AdamW
//! cargo bench --bench rules -- float32/avx2
//! ```
//!
//! Not measured: several threads, arrays beyond the cache, strided ones, half precision, methods that take a closure.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use roptim::cpu::reduce::{Summand, norm};
use roptim::cpu::{Isa, Threads};
use roptim::real::Real;
use roptim::rule::{Facts, Sparse};
use roptim::rules::{Method, RuleId};
use roptim::tensor::Rows;
use roptim::{Guard, Hyper, Optimizer, Options, ParamInfo, Preset, REGISTRY, Range, TensorRef, Value};

/// Elements of the tensor that elementwise rules step: with two slots 256 KiB in float32.
const IN_CACHE: usize = 16 * 1024;
/// Rows and columns of the matrix that tensor rules step.
const MATRIX: [usize; 2] = [256, 256];
/// Elements of a row of a sparse gradient.
const ROW: usize = 64;
/// Elements that norms are taken of.
const NORM: usize = 1024 * 1024;
/// Optimizers measured in float64 as well.
const IN_FLOAT64: &[&str] = &["SGD", "AdamW", "RMSprop"];

type Changes = Vec<(&'static str, Value)>;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(150))
        .measurement_time(Duration::from_millis(600))
        .sample_size(30)
        .nresamples(10_000)
        .without_plots()
        .configure_from_args();
    for preset in REGISTRY {
        match preset.method {
            Method::Elementwise(rule) => elementwise(&mut criterion, preset, rule),
            Method::Tensor(_) => tensors(&mut criterion, preset),
            Method::Closure(_) => {}
        }
    }
    norms(&mut criterion);
    criterion.final_summary();
}

/// The instruction sets of this machine, weakest first.
fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect())
}

fn elementwise(criterion: &mut Criterion, preset: &Preset, rule: RuleId) {
    let mut group = criterion.benchmark_group(preset.name);
    for (kernel, changes) in kernels(preset, rule) {
        for isa in levels() {
            step::<f32>(&mut group, kernel, preset, &[IN_CACHE], &changes, isa, Guard::default());
        }
        if IN_FLOAT64.contains(&preset.name) {
            for isa in levels() {
                step::<f64>(&mut group, kernel, preset, &[IN_CACHE], &changes, isa, Guard::default());
            }
        }
    }
    group.finish();
}

fn tensors(criterion: &mut Criterion, preset: &Preset) {
    let mut group = criterion.benchmark_group(preset.name);
    let kernel = preset.declaration().stem;
    step::<f32>(&mut group, kernel, preset, &MATRIX, &[], Isa::detect(), Guard::default());
    group.finish();
}

/// A norm by itself, and within a step: what `clip_norm` adds is the difference to the step without.
fn norms(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("norm");
    norm_alone::<f32>(&mut group);
    norm_alone::<f64>(&mut group);
    let sgd = Preset::find("SGD").expect("the registry has it");
    let clip_norm = Guard { clip_norm: Some(1.0), ..Guard::default() };
    for (name, guard) in [("SGD", Guard::default()), ("SGD with clip_norm", clip_norm)] {
        step::<f32>(&mut group, name, sgd, &[NORM], &[], Isa::detect(), guard);
    }
    group.finish();
}

fn norm_alone<F: Real>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let x = numbers::<F>(2, NORM);
    let of = [Summand::from(TensorRef::from(x.as_slice()))];
    let mut threads = Threads::new(Some(1));
    group.throughput(Throughput::Elements(NORM as u64));
    group.bench_function(BenchmarkId::new("alone", F::DTYPE), |b| b.iter(|| norm(black_box(&of), &mut threads)));
}

/// Measures steps of one tensor of this shape.
fn step<F: Real>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kernel: &str,
    preset: &Preset,
    shape: &[usize],
    changes: &[(&'static str, Value)],
    isa: Isa,
    guard: Guard,
) {
    let n = shape.iter().product();
    let (mut p, g) = (numbers::<F>(1, n), numbers::<F>(2, n));
    let mut optimizer = Optimizer::cpu(preset.name, &Options { threads: Some(1), guard, ..Options::default() })
        .expect("the name is the registry's");
    optimizer.force_cpu(isa, n);
    let info = ParamInfo { shape: shape.to_vec(), ..ParamInfo::vector("p", n, F::DTYPE) };
    optimizer.add_group(changes, vec![info]).expect("the changes were tried");
    let gradient = match preset.declaration().sparse {
        Sparse::Required => {
            TensorRef::from(g.as_slice()).of_rows(Rows::new((0..n / ROW).collect(), ROW, n).expect("all rows in order"))
        }
        _ => g.as_slice().into(),
    };
    let gradients = [Some(gradient)];
    group.throughput(Throughput::Elements(n as u64));
    group.bench_function(BenchmarkId::new(kernel, format!("{}/{}", F::DTYPE, isa.name())), |b| {
        b.iter(|| optimizer.step(&mut [p.as_mut_slice().into()], black_box(&gradients)).expect("nothing is wrong"));
    });
}

/// Numbers in [-0.5, 0.5), the same on every run and none of them zero, so that no state becomes subnormal.
fn numbers<F: Real>(seed: u64, n: usize) -> Vec<F> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        F::from_f64(((x >> 40) as f64 + 0.5) / (1u64 << 24) as f64 - 0.5)
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// Every kernel of the preset, with the fewest changed hyperparameters that lead to it.
fn kernels(preset: &Preset, rule: RuleId) -> Vec<(&'static str, Changes)> {
    let singles: Vec<_> = preset.declaration().hypers.iter().filter_map(away_from_default).collect();
    let pairs = singles.iter().enumerate().flat_map(|(i, &a)| singles[..i].iter().map(move |&b| vec![b, a]));
    let mut found: Vec<(&'static str, Changes)> = Vec::new();
    for changes in std::iter::once(vec![]).chain(singles.iter().map(|&one| vec![one])).chain(pairs) {
        let Ok(hypers) = preset.group(preset.name, &changes) else { continue };
        let kernel = rule.with_kernel(&hypers, Facts).entry;
        if !found.iter().any(|(known, _)| *known == kernel) {
            found.push((kernel, changes));
        }
    }
    for facts in rule.kernels() {
        assert!(found.iter().any(|(kernel, _)| *kernel == facts.entry), "{}: no way to {}", preset.name, facts.entry);
    }
    found
}

/// A value that may choose another kernel.
fn away_from_default(hyper: &Hyper) -> Option<(&'static str, Value)> {
    match hyper.range {
        Range::Flag => Some((hyper.name, Value::Bool(hyper.default != Value::Bool(true)))),
        Range::AtLeast(low) | Range::From(low, _) => Some((hyper.name, Value::Float(low + 0.9))),
        _ => None,
    }
}
