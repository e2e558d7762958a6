//! What steps allocate, and what becomes of them where an allocation fails.

#[path = "common/extent.rs"]
mod extent;
#[path = "common/numbers.rs"]
mod numbers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use extent::is_brief;
use roptim::closure::Ask;
use roptim::hyper::Choice;
use roptim::rule::Sparse;
use roptim::rules::HELPERS;
use roptim::tensor::{RawTensor, Rows, Strides};
use roptim::{
    Dtype, ErrorKind, Guard, Nonfinite, Optimizer, Options, ParamInfo, Preset, REGISTRY, StateDict, TensorMut,
    TensorRef, Value,
};

use numbers::numbers;

/// Counts allocations, and lets one fail that a thread asks it to.
struct Watched;

/// Allocations of all threads.
static TOTAL: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Allocations of this thread.
    static OWN: Cell<usize> = const { Cell::new(0) };
    /// Large allocations of this thread that still succeed before one fails.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// From so many bytes on an allocation may be made to fail: above what lists of a few tensors and nodes of maps take.
const LARGE: usize = 4096;

/// Whether the `matrixmultiply` crate packs parts of matrices there: nothing else has such an alignment and is not zeroed.
/// It takes at most some megabytes, and the process ends where there are none.
fn is_packing(layout: Layout) -> bool {
    layout.align() >= 32
}

/// Notes an allocation; whether it is to succeed.
fn noted(layout: Layout) -> bool {
    TOTAL.fetch_add(1, Ordering::Relaxed);
    OWN.set(OWN.get() + 1);
    match LEFT.get() {
        Some(left) if layout.size() >= LARGE => {
            LEFT.set(left.checked_sub(1));
            left > 0
        }
        _ => true,
    }
}

// SAFETY: every block is the system allocator's own, or none. Counting allocates nothing: the cells need neither
// initialization nor a destructor.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_packing(layout) || noted(layout) {
            // SAFETY: the caller's duties are the same.
            unsafe { System.alloc(layout) }
        } else {
            std::ptr::null_mut()
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if noted(layout) {
            // SAFETY: the caller's duties are the same.
            unsafe { System.alloc_zeroed(layout) }
        } else {
            std::ptr::null_mut()
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's duties are the same.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// One test at a time: one of them counts what all threads allocate.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a rule takes gradients, and only sparse ones.
fn needs_rows(preset: &Preset) -> bool {
    preset.declaration().sparse == Sparse::Required
}

/// How arrays of a test lie.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Form {
    dtype: Dtype,
    /// In Fortran order.
    turned: bool,
}

const PLAIN: Form = Form { dtype: Dtype::F32, turned: false };

/// A matrix of some dtype in memory of its own.
struct Owned {
    /// Enough for every dtype.
    memory: Vec<f64>,
    shape: [usize; 2],
    form: Form,
}

impl Owned {
    fn new(seed: u64, shape: [usize; 2], form: Form) -> Self {
        let n = shape.iter().product();
        let mut owned = Self { memory: vec![0.0; n], shape, form };
        for (i, x) in numbers(seed, n).into_iter().enumerate() {
            owned.set(i, x);
        }
        owned
    }

    /// Sets an element, counted in memory.
    fn set(&mut self, i: usize, x: f32) {
        let size = self.form.dtype.size();
        let number: Vec<u8> = match self.form.dtype {
            Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::F64 => f64::from(x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        for (k, byte) in number.into_iter().enumerate() {
            let (word, at) = ((i * size + k) / 8, (i * size + k) % 8);
            let mut bytes = self.memory[word].to_bits().to_le_bytes();
            bytes[at] = byte;
            self.memory[word] = f64::from_bits(u64::from_le_bytes(bytes));
        }
    }

    fn raw(&mut self) -> RawTensor {
        let Form { dtype, turned } = self.form;
        let [rows, columns] = self.shape;
        let size = dtype.size() as isize;
        let bytes = vec![size, size * rows as isize];
        let strides = turned.then(|| Arc::new(Strides { shape: self.shape.to_vec(), bytes }));
        RawTensor { ptr: self.memory.as_mut_ptr().cast(), len: rows * columns, dtype, strides }
    }

    fn bits(&self) -> Vec<u64> {
        self.memory.iter().map(|x| x.to_bits()).collect()
    }
}

fn arrays(seed: u64, shapes: &[[usize; 2]], form: Form) -> Vec<Owned> {
    shapes.iter().enumerate().map(|(i, &shape)| Owned::new(seed + i as u64, shape, form)).collect()
}

/// Views to write; each call's are used before the next one.
fn writable(arrays: &mut [Owned]) -> Vec<TensorMut<'static>> {
    // SAFETY: vectors that outlive the views and do not grow, one for each view.
    arrays.iter_mut().map(|a| unsafe { TensorMut::from_raw(a.raw()) }).collect()
}

fn readable(arrays: &mut [Owned], sparse: bool) -> Vec<Option<TensorRef<'static>>> {
    let of = |a: &mut Owned| {
        let n = a.memory.len();
        // SAFETY: as in `writable`.
        let all = unsafe { TensorRef::from_raw(a.raw()) };
        Some(if sparse { all.of_rows(Rows::new((0..n).collect(), 1, n).unwrap()) } else { all })
    };
    arrays.iter_mut().map(of).collect()
}

/// An optimizer over matrices, the last of them in a group of its own.
fn optimizer(
    preset: &Preset,
    options: &Options,
    hypers: &[(&str, Value)],
    shapes: &[[usize; 2]],
    dtype: Dtype,
) -> Optimizer {
    let mut optimizer = Optimizer::cpu(preset.name, options).unwrap();
    let info = |(i, shape): (usize, &[usize; 2])| ParamInfo {
        name: Some(format!("p{i}")),
        shape: shape.to_vec(),
        dtype,
        resident: false,
    };
    let mut infos: Vec<_> = shapes.iter().enumerate().map(info).collect();
    let last = infos.split_off(infos.len() - 1);
    if !infos.is_empty() {
        optimizer.add_group(hypers, infos).unwrap();
    }
    optimizer.add_group(hypers, last).unwrap();
    optimizer
}

/// Hyperparameters that choose other variants of a rule.
fn variants(preset: &Preset) -> Vec<Vec<(&'static str, Value)>> {
    let mut all = vec![Vec::new()];
    for change in [
        ("momentum", Value::Float(0.9)),
        ("amsgrad", Value::Bool(true)),
        ("centered", Value::Bool(true)),
        ("weight_decay", Value::Float(0.1)),
    ] {
        let known = preset.declaration().hypers.iter().any(|hyper| hyper.name == change.0);
        // Sparse gradients are taken without decay.
        if known && !(change.0 == "weight_decay" && needs_rows(preset)) {
            all.push(vec![change]);
        }
    }
    all
}

// ---- what steps allocate ---------------------------------------------------------------------------------

#[test]
fn steps_of_small_tensors_allocate_nothing() {
    let _turn = alone();
    let bounds = [
        Guard::default(),
        Guard { clip_norm: Some(0.5), ..Guard::default() },
        Guard { clip_value: Some(0.5), nonfinite: Nonfinite::Skip, ..Guard::default() },
        Guard { clip_norm: Some(0.5), clip_value: Some(0.5), nonfinite: Nonfinite::Raise },
    ];
    let forms = [
        PLAIN,
        Form { turned: true, ..PLAIN },
        Form { dtype: Dtype::F64, turned: false },
        Form { dtype: Dtype::F16, turned: false },
        Form { dtype: Dtype::BF16, turned: true },
    ];
    let shapes = [[5, 3], [1, 7], [4, 4], [70, 40]];
    let most = if is_brief() { 5 } else { 1000 };
    for preset in REGISTRY.iter().chain(HELPERS).filter(|preset| !preset.needs_closure()) {
        for (guard, form) in bounds.iter().flat_map(|guard| forms.iter().map(move |form| (*guard, *form))) {
            for hypers in variants(preset) {
                for clears in [false, true] {
                    if clears && needs_rows(preset) {
                        continue;
                    }
                    let options = Options { guard, threads: Some(2), ..Options::default() };
                    let mut optimizer = optimizer(preset, &options, &hypers, &shapes, form.dtype);
                    optimizer.set_grad_scale(if form == PLAIN { 4.0 } else { 1.0 }).unwrap();
                    let (mut p, mut g) = (arrays(1, &shapes, form), arrays(50, &shapes, form));
                    let (mut p, mut written) =
                        (writable(&mut p), writable(&mut g).into_iter().map(Some).collect::<Vec<_>>());
                    let g = readable(&mut g, needs_rows(preset));
                    let steps = if guard == bounds[0] && form == PLAIN { most } else { 20.min(most) };
                    let mut before = 0;
                    for step in 1..=steps {
                        if clears {
                            optimizer.step_and_clear(&mut p, &mut written).unwrap();
                        } else {
                            optimizer.step(&mut p, &g).unwrap();
                        }
                        if step == 1 {
                            before = OWN.get();
                        }
                        let count = OWN.get() - before;
                        assert!(count == 0, "{} {hypers:?} {guard:?} {form:?}: {count} in step {step}", preset.name);
                    }
                }
            }
        }
    }
}

#[test]
fn updates_that_are_left_out_allocate_nothing() {
    let _turn = alone();
    let guard = Guard { nonfinite: Nonfinite::Skip, clip_norm: Some(1.0), ..Guard::default() };
    let mut adam = optimizer(
        Preset::find("Adam").unwrap(),
        &Options { guard, ..Options::default() },
        &[],
        &[[3, 4]; 3],
        Dtype::F32,
    );
    let (mut p, mut g) = (arrays(1, &[[3, 4]; 3], PLAIN), arrays(2, &[[3, 4]; 3], PLAIN));
    g[1].set(5, f32::INFINITY);
    let (mut p, g) = (writable(&mut p), readable(&mut g, false));
    adam.step(&mut p, &g).unwrap();
    let before = OWN.get();
    (0..100).for_each(|_| adam.step(&mut p, &g).unwrap());
    assert_eq!((OWN.get() - before, adam.skip_count()), (0, 101));
}

#[test]
fn steps_on_several_threads_allocate_a_message_for_each_thread() {
    let _turn = alone();
    let steps = if is_brief() { 100 } else { 1000 };
    for threads in [2, 3] {
        for clip_norm in [None, Some(1.0)] {
            let options = Options {
                threads: Some(threads),
                guard: Guard { clip_norm, ..Guard::default() },
                ..Options::default()
            };
            let shapes = [[100, 300], [200, 200]];
            let mut adam = optimizer(Preset::find("AdamW").unwrap(), &options, &[], &shapes, Dtype::F32);
            let (mut p, mut g) = (arrays(1, &shapes, PLAIN), arrays(2, &shapes, PLAIN));
            let (mut p, g) = (writable(&mut p), readable(&mut g, false));
            (0..10).for_each(|_| adam.step(&mut p, &g).unwrap());
            let before = TOTAL.load(Ordering::Relaxed);
            (0..steps).for_each(|_| adam.step(&mut p, &g).unwrap());
            let count = TOTAL.load(Ordering::Relaxed) - before;
            // A message for each other thread, a gate where one was late for the call before, and now and then a block of
            // rayon's queue, which 32 messages share.
            let calls = steps * if clip_norm.is_some() { 2 } else { 1 };
            let most = calls * (threads - 1) + calls + calls * (threads - 1) / 16;
            assert!(
                count <= most,
                "{threads} threads, clip_norm {clip_norm:?}: {count} in {steps} steps, {most} allowed"
            );
        }
    }
}

// ---- allocations that fail -------------------------------------------------------------------------------

/// What is called.
type Call =
    fn(&mut Optimizer, &mut [TensorMut<'static>], &[Option<TensorRef<'static>>]) -> roptim::Result<Option<StateDict>>;

/// A call, and what an optimizer did before it.
struct Case {
    name: String,
    make: Box<dyn Fn() -> Optimizer>,
    shapes: Vec<[usize; 2]>,
    form: Form,
    call: Call,
    sparse: bool,
    /// How often it is called before.
    steps: usize,
    /// Whether gradients were accumulated for it.
    has_sums: bool,
}

/// What a call left: parameters, state, and what it returned.
#[derive(PartialEq)]
struct After {
    parameters: Vec<Vec<u64>>,
    state: StateDict,
    returned: Option<StateDict>,
    has_sums: bool,
}

impl Case {
    /// Calls after `fails_at` large allocations with one that fails; then, where it did, once more without. Whether one
    /// failed.
    fn run(&self, fails_at: Option<usize>, want: Option<&After>) -> (bool, After) {
        let mut optimizer = (self.make)();
        let (mut p, mut g) = (arrays(1, &self.shapes, self.form), arrays(50, &self.shapes, self.form));
        let (mut views, gradients) = (writable(&mut p), readable(&mut g, self.sparse));
        for _ in 0..self.steps {
            (self.call)(&mut optimizer, &mut views, &gradients).unwrap();
        }
        if self.has_sums {
            optimizer.accumulate(&gradients).unwrap();
        }
        let state_before = optimizer.state_dict().unwrap();
        let before: Vec<_> = p.iter().map(Owned::bits).collect();
        let has_sums = optimizer.has_sums();
        LEFT.set(fails_at);
        let outcome = (self.call)(&mut optimizer, &mut views, &gradients);
        let failed = fails_at.is_some() && LEFT.replace(None).is_none();
        let returned = match outcome {
            Ok(returned) => returned,
            Err(error) => {
                let place = format!("{}, allocation {fails_at:?}: {error}", self.name);
                assert!(failed && error.kind() == ErrorKind::OutOfMemory, "{place}");
                assert!(error.to_string().ends_with("could not be allocated"), "{place}");
                assert!(p.iter().map(Owned::bits).eq(before), "{place}: parameters changed");
                assert!(optimizer.state_dict().unwrap() == state_before, "{place}: state changed");
                assert!(!optimizer.is_torn() && optimizer.has_sums() == has_sums, "{place}");
                (self.call)(&mut optimizer, &mut views, &gradients).unwrap()
            }
        };
        let state = optimizer.state_dict().unwrap();
        let after =
            After { parameters: p.iter().map(Owned::bits).collect(), state, returned, has_sums: optimizer.has_sums() };
        assert!(want.is_none_or(|want| *want == after), "{}, allocation {fails_at:?}: another result", self.name);
        (failed, after)
    }

    /// Lets each allocation fail in turn; how many there are.
    fn sweep(&self) -> usize {
        let (_, want) = self.run(None, None);
        (0..).find(|&n| !self.run(Some(n), Some(&want)).0).unwrap()
    }
}

fn step(
    optimizer: &mut Optimizer,
    p: &mut [TensorMut<'static>],
    g: &[Option<TensorRef<'static>>],
) -> roptim::Result<Option<StateDict>> {
    optimizer.step(p, g).map(|()| None)
}

fn accumulate(
    optimizer: &mut Optimizer,
    _: &mut [TensorMut<'static>],
    g: &[Option<TensorRef<'static>>],
) -> roptim::Result<Option<StateDict>> {
    optimizer.accumulate(g).map(|()| None)
}

fn step_accumulated(
    optimizer: &mut Optimizer,
    p: &mut [TensorMut<'static>],
    _: &[Option<TensorRef<'static>>],
) -> roptim::Result<Option<StateDict>> {
    optimizer.step_accumulated(p, roptim::Besides::default()).map(|()| None)
}

fn copy_state(
    optimizer: &mut Optimizer,
    _: &mut [TensorMut<'static>],
    _: &[Option<TensorRef<'static>>],
) -> roptim::Result<Option<StateDict>> {
    optimizer.state_dict().map(Some)
}

/// Evaluates (x − 0.1)² until the step is over.
fn minimize(
    optimizer: &mut Optimizer,
    p: &mut [TensorMut<'static>],
    g: &[Option<TensorRef<'static>>],
) -> roptim::Result<Option<StateDict>> {
    optimizer.begin(p)?;
    let mut loss = 1.0;
    // Any gradients do; a loss that falls lets the method go on.
    while optimizer.tell(loss, p, g)? == Ask::Evaluate {
        loss *= 0.9;
    }
    Ok(None)
}

#[test]
fn an_allocation_that_fails_is_an_error_and_changes_nothing() {
    let _turn = alone();
    const SHAPES: [[usize; 2]; 3] = [[30, 40], [40, 30], [36, 36]];
    let guards = [Guard::default(), Guard { clip_norm: Some(0.5), nonfinite: Nonfinite::Skip, ..Guard::default() }];
    let mut cases = Vec::new();
    for preset in REGISTRY.iter().chain(HELPERS) {
        for guard in guards.iter().filter(|guard| !preset.needs_closure() || **guard == guards[0]) {
            for hypers in variants(preset) {
                let dtypes: &[Dtype] =
                    if preset.needs_closure() { &[Dtype::F32, Dtype::F64] } else { &[Dtype::F32, Dtype::F16] };
                for &dtype in dtypes {
                    let form = Form { dtype, turned: dtype == Dtype::F16 };
                    let (guard, chosen) = (*guard, hypers.clone());
                    let make = move || {
                        let options = Options { guard, threads: Some(1), ..Options::default() };
                        optimizer(preset, &options, &chosen, &SHAPES, dtype)
                    };
                    let name = format!("{} {hypers:?} {dtype}", preset.name);
                    let calls: &[(&str, Call, usize)] = match () {
                        () if preset.needs_closure() => &[("minimize", minimize, 0), ("minimize", minimize, 3)],
                        () if needs_rows(preset) => &[("step", step, 0), ("step", step, 2)],
                        () => &[
                            ("step", step, 0),
                            ("step", step, 2),
                            ("accumulate", accumulate, 0),
                            ("accumulate", accumulate, 1),
                            ("step_accumulated", step_accumulated, 0),
                        ],
                    };
                    for &(what, call, steps) in calls {
                        let name = format!("{name}: {what} after {steps}");
                        let (make, shapes) = (Box::new(make.clone()), SHAPES.to_vec());
                        cases.push(Case {
                            name,
                            make,
                            shapes,
                            form,
                            call,
                            sparse: needs_rows(preset),
                            steps,
                            has_sums: what == "step_accumulated",
                        });
                    }
                }
            }
        }
        if preset.declaration().sparse == Sparse::Accepted && !preset.needs_closure() {
            for (hypers, steps) in variants(preset).into_iter().flat_map(|hypers| [(hypers.clone(), 0), (hypers, 1)]) {
                if hypers.iter().any(|(name, _)| *name == "weight_decay") {
                    continue;
                }
                let name = format!("{} {hypers:?}: sparse step after {steps}", preset.name);
                let make = move || {
                    optimizer(preset, &Options { threads: Some(1), ..Options::default() }, &hypers, &SHAPES, Dtype::F32)
                };
                let (make, shapes) = (Box::new(make), SHAPES.to_vec());
                cases.push(Case { name, make, shapes, form: PLAIN, call: step, sparse: true, steps, has_sums: false });
            }
        }
    }
    let mut swept = 0;
    for case in &cases {
        swept += case.sweep();
    }
    // State of every optimizer, sums, copies of sparse and of narrow arrays: hundreds.
    assert!(swept > 500, "{swept} allocations of {} calls", cases.len());
}

#[test]
fn a_copy_of_the_state_that_fails_is_an_error() {
    let _turn = alone();
    let mut swept = 0;
    for preset in REGISTRY.iter().chain(HELPERS) {
        const SEARCH: &[(&str, Value)] = &[("line_search_fn", Value::Choice(Choice::StrongWolfe))];
        let hypers = if preset.name == "LBFGS" { SEARCH } else { &[] };
        let make = move || {
            let mut made = optimizer(
                preset,
                &Options { threads: Some(1), ..Options::default() },
                hypers,
                &[[30, 40], [40, 30]],
                Dtype::F32,
            );
            let shapes = [[30, 40], [40, 30]];
            let (mut p, mut g) = (arrays(1, &shapes, PLAIN), arrays(50, &shapes, PLAIN));
            let (mut p, g) = (writable(&mut p), readable(&mut g, needs_rows(preset)));
            for _ in 0..3 {
                let call: Call = if preset.needs_closure() { minimize } else { step };
                call(&mut made, &mut p, &g).unwrap();
            }
            made
        };
        let shapes = vec![[30, 40], [40, 30]];
        let name = format!("{}: state_dict", preset.name);
        let case = Case {
            name,
            make: Box::new(make),
            shapes,
            form: PLAIN,
            call: copy_state,
            sparse: false,
            steps: 0,
            has_sums: false,
        };
        swept += case.sweep();
        refuses_to_load_without_memory(preset, &make);
    }
    assert!(swept > 30, "{swept}");
}

/// Lets each large allocation of a load fail in turn.
fn refuses_to_load_without_memory(preset: &Preset, make: &dyn Fn() -> Optimizer) {
    let mut source = make();
    let saved = source.state_dict().unwrap();
    for n in 0.. {
        let mut fresh = make();
        let before = fresh.state_dict().unwrap();
        LEFT.set(Some(n));
        let loaded = fresh.load_state_dict(&saved);
        let failed = LEFT.replace(None).is_none();
        match loaded {
            Ok(_) if !failed => break,
            Ok(_) => {}
            Err(error) => {
                assert!(failed && error.kind() == ErrorKind::OutOfMemory, "{}: {error}", preset.name);
                assert!(fresh.state_dict().unwrap() == before, "{}, allocation {n}", preset.name);
                fresh.load_state_dict(&saved).unwrap();
            }
        }
        assert!(fresh.state_dict().unwrap() == saved, "{}, allocation {n}", preset.name);
    }
}
