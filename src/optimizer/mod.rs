//! An optimizer: a preset, its groups, the store, and an executor.

mod accumulate;
mod besides;
mod closure;
mod groups;
mod guard;
pub mod matching;
mod state;

use std::fmt;
use std::sync::Arc;

use crate::cpu;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::hyper::{Hypers, Value};
use crate::real::Dtype;
use crate::room;
use crate::rule::{MAX_SLOTS, Moment, Row, ScalarSlots, Shared, SlotSet, Sparse};
use crate::rules::{Method, Preset, RuleId, TensorRuleId};
use crate::store::{Array, Entry, ParamInfo};
use crate::tensor::{Buffer, RawTensor, TensorMut, TensorRef};
pub use besides::Besides;
use besides::readings;
use groups::Groups;
use guard::Verdict;
pub use guard::{Guard, Nonfinite};

/// Where and how steps run; the same for all groups.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads on the CPU; `None` for as many as the process may use.
    pub threads: Option<usize>,
    /// Whether slots below the smallest normal number are stored as zero.
    pub flush_subnormals: bool,
    /// Bounds of the gradients.
    pub guard: Guard,
    /// On a GPU: whether a step that may leave its update out waits until it is known.
    pub nonfinite_sync: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: None, flush_subnormals: true, guard: Guard::default(), nonfinite_sync: false }
    }
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "an optimizer has one, and a step goes through no pointer more")]
enum Backend {
    Cpu(cpu::Executor),
    #[cfg(feature = "gpu")]
    Gpu(Box<gpu::Executor>),
    /// Of methods that evaluate the loss several times: parameters stay on the host, the method's vectors do not.
    #[cfg(feature = "gpu")]
    GpuVectors(gpu::VectorSpace),
}

impl Backend {
    /// The CPU's executor, where it is known that steps run there.
    fn cpu(&mut self) -> &mut cpu::Executor {
        match self {
            Self::Cpu(executor) => executor,
            #[cfg(feature = "gpu")]
            Self::Gpu(_) | Self::GpuVectors(_) => unreachable!("called for the CPU backend"),
        }
    }

    /// The CPU's threads, where work on so many elements is worth them.
    fn pool(&mut self, elements: usize) -> Option<&rayon::ThreadPool> {
        match self {
            Self::Cpu(executor) => executor.threads.pool(elements >= cpu::INLINE_ELEMENTS),
            #[cfg(feature = "gpu")]
            Self::Gpu(_) | Self::GpuVectors(_) => None,
        }
    }
}

/// An optimizer over parameters that the caller owns.
///
/// ```
/// use roptim::{Dtype, Optimizer, Options, ParamInfo, Value};
///
/// let mut w = vec![1.0f32, -2.0, 3.0];
/// let mut adam = Optimizer::cpu("AdamW", &Options::default())?;
/// adam.add_group(&[("lr", Value::Float(0.1))], vec![ParamInfo::vector("w", 3, Dtype::F32)])?;
/// for _ in 0..200 {
///     let gradient: Vec<f32> = w.iter().map(|w| 2.0 * w).collect();
///     adam.step(&mut [w.as_mut_slice().into()], &[Some(gradient.as_slice().into())])?;
/// }
/// assert!(w.iter().all(|w| w.abs() < 0.1));
/// # Ok::<(), roptim::Error>(())
/// ```
#[derive(Debug)]
pub struct Optimizer {
    preset: &'static Preset,
    groups: Groups,
    entries: Vec<Entry>,
    backend: Backend,
    /// Of methods that evaluate the loss several times in a step.
    minimizer: Option<Box<dyn closure::Minimizer>>,
    flush_subnormals: bool,
    guard: Guard,
    nonfinite_sync: bool,
    grad_scale: f64,
    /// For what reads or copies arrays around a step.
    threads: cpu::Threads,
    gradient_norm: Option<f64>,
    /// The last step's norm lies on the device.
    #[cfg(feature = "gpu")]
    norm_on_device: bool,
    /// A step on the device may have left its update out: the scalar slots before it, by parameter.
    #[cfg(feature = "gpu")]
    pending: Option<Vec<(usize, ScalarSlots)>>,
    skip_count: u64,
    update_count: u64,
    allocations: u64,
    torn: bool,
    scratch: Scratch,
    /// Of the last step, where it took them.
    squares: Vec<Option<cpu::Squares>>,
    /// Sums of gradients on the host, by parameter; empty where there are none.
    sums: Vec<Option<accumulate::Sum>>,
    /// Allocations and changes of groups that the executor's jobs were made with.
    jobs_made_at: Option<(u64, u64)>,
}

/// Reused from step to step.
#[derive(Debug, Default)]
struct Scratch {
    rows: Vec<Row>,
    /// By row: scalar slots after the update.
    scalars: Vec<ScalarSlots>,
    /// By first group of those alike: the last moment and scalar slots asked for and their row.
    latest: Vec<Option<(Moment, ScalarSlots, usize)>>,
    /// By parameter: its row in this step.
    row_of: Vec<Option<usize>>,
    /// By parameter: slots allocated for this step.
    fresh: Vec<SlotSet>,
    /// Sparse gradients of rules whose other rows do not rest, with zeros in these.
    dense: Vec<Buffer>,
    /// What all gradients are multiplied by.
    gradient_scale: f64,
    /// Whether gradients are still to be set to zero.
    clears_gradients: bool,
    /// Numbers of the gradients that there are.
    present: Vec<usize>,
    /// Of their norm.
    joined: cpu::reduce::Joined,
    /// Gradients that are also written, as they are read.
    read: Vec<Option<TensorRef<'static>>>,
}

impl Scratch {
    /// Nothing of the step before, and room for this one.
    fn clear(&mut self, groups: usize, entries: usize) -> Result<()> {
        const WHAT: &str = "the numbers of a step";
        room::reserve(&mut self.rows, groups, WHAT)?;
        room::reserve(&mut self.scalars, groups, WHAT)?;
        room::reserve(&mut self.latest, groups, WHAT)?;
        room::reserve(&mut self.row_of, entries, WHAT)?;
        room::reserve(&mut self.fresh, entries, WHAT)?;
        self.rows.clear();
        self.scalars.clear();
        self.fresh.clear();
        self.dense.clear();
        self.latest.clear();
        self.latest.resize(groups, None);
        self.row_of.clear();
        self.row_of.resize(entries, None);
        Ok(())
    }

    /// Index of the coefficient row of a parameter whose group is alike `group`. Parameters of a group mostly are at the
    /// same moment; where they alternate a row may stand twice.
    fn row(
        &mut self,
        index: usize,
        entry: &Entry,
        group: usize,
        at: Moment,
        compute: impl FnOnce(&mut ScalarSlots) -> Row,
    ) -> usize {
        let row = match self.latest[group] {
            Some((moment, scalars, row)) if moment == at && scalars == entry.scalars => row,
            _ => {
                let mut scalars = entry.scalars;
                self.rows.push(compute(&mut scalars));
                self.scalars.push(scalars);
                self.latest[group] = Some((at, entry.scalars, self.rows.len() - 1));
                self.rows.len() - 1
            }
        };
        self.row_of[index] = Some(row);
        row
    }
}

impl Optimizer {
    /// An optimizer by its registry name, on the CPU.
    pub fn cpu(name: &str, options: &Options) -> Result<Self> {
        let executor = cpu::Executor::new(cpu::Threads::new(options.threads));
        Self::with_backend(Preset::find(name)?, Backend::Cpu(executor), options)
    }

    /// An optimizer by its registry name, on a GPU.
    #[cfg(feature = "gpu")]
    pub fn gpu(name: &str, options: &Options, device: &gpu::DeviceRequest) -> Result<Self> {
        let preset = Preset::find(name)?;
        if let Method::Closure(_) = preset.method {
            let space = gpu::VectorSpace::new(preset.name, device)?;
            return Self::with_backend(preset, Backend::GpuVectors(space), options);
        }
        if !preset.has_shader() {
            return Err(cpu_only(preset));
        }
        let executor = gpu::Executor::new(preset.name, preset.method, device)?;
        Self::with_backend(preset, Backend::Gpu(Box::new(executor)), options)
    }

    fn with_backend(preset: &'static Preset, backend: Backend, options: &Options) -> Result<Self> {
        options.guard.check(preset.name)?;
        if preset.needs_closure() && options.guard != Guard::default() {
            let got = format!("{:?}", options.guard);
            return Err(Error::refuse(ErrorKind::Value, preset.name, "bounds of gradients", "absent", got)
                .with_remedy("a line search needs the gradients of the loss it is told"));
        }
        Ok(Self {
            preset,
            groups: Groups::default(),
            entries: Vec::new(),
            backend,
            minimizer: None,
            flush_subnormals: options.flush_subnormals,
            guard: options.guard,
            nonfinite_sync: options.nonfinite_sync,
            grad_scale: 1.0,
            threads: cpu::Threads::new(options.threads),
            gradient_norm: None,
            #[cfg(feature = "gpu")]
            norm_on_device: false,
            #[cfg(feature = "gpu")]
            pending: None,
            skip_count: 0,
            update_count: 0,
            allocations: 0,
            torn: false,
            scratch: Scratch::default(),
            squares: Vec::new(),
            sums: Vec::new(),
            jobs_made_at: None,
        })
    }

    /// The registry entry.
    pub fn preset(&self) -> &'static Preset {
        self.preset
    }

    /// Hyperparameters of each group.
    pub fn groups(&self) -> &[Hypers] {
        &self.groups
    }

    /// Parameters and their state, in order of registration.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Applied updates, the clock of schedules. On a GPU, one whose gradients are not finite may still be counted
    /// until [`Optimizer::settle`].
    pub fn update_count(&self) -> u64 {
        self.update_count
    }

    /// Updates that were left out because a gradient was not finite.
    pub fn skip_count(&self) -> u64 {
        self.skip_count
    }

    /// The 2-norm of the last step's gradients before they were scaled; none without a bound on it. On a GPU this
    /// waits for the step.
    pub fn gradient_norm(&mut self) -> Result<Option<f64>> {
        #[cfg(feature = "gpu")]
        if self.norm_on_device
            && let Backend::Gpu(executor) = &mut self.backend
        {
            self.gradient_norm = noted(executor.gradient_norm(), &mut self.torn)?;
            self.norm_on_device = false;
        }
        Ok(self.gradient_norm)
    }

    /// Says what the norm of the last step's gradients was, for an optimizer that goes on with another's work.
    pub fn set_gradient_norm(&mut self, norm: Option<f64>) {
        self.gradient_norm = norm;
    }

    /// Waits until it is known what became of the last step on a GPU.
    ///
    /// Where it left its update out, counts and scalar slots return to those before it; with
    /// [`Nonfinite::Raise`] this is the error that the step could not return. Without such a step nothing happens.
    pub fn settle(&mut self) -> Result<()> {
        self.settle_with(&[])
    }

    /// [`Optimizer::settle`], where the step's gradients are still at hand: an error then says where in one it was.
    fn settle_with(&mut self, gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        #[cfg(not(feature = "gpu"))]
        let _ = gradients;
        #[cfg(feature = "gpu")]
        if let Some(before) = self.pending.take()
            && let Backend::Gpu(executor) = &mut self.backend
            && noted(executor.settle(), &mut self.torn)?
        {
            for (index, scalars) in before {
                self.entries[index].step -= 1;
                self.entries[index].scalars = scalars;
            }
            self.update_count = self.update_count.saturating_sub(1);
            return self.left_out(gradients);
        }
        Ok(())
    }

    /// Counts or reports an update that the device left out.
    #[cfg(feature = "gpu")]
    fn left_out(&mut self, gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        if self.guard.nonfinite == Nonfinite::Skip {
            self.skip_count = self.skip_count.saturating_add(1);
            return Ok(());
        }
        let Backend::Gpu(executor) = &mut self.backend else { return Ok(()) };
        match noted(executor.culprit(), &mut self.torn)? {
            Some(gpu::Culprit { index, is_nan }) => {
                let at_hand = gradients.get(index).and_then(Option::as_ref).filter(|g| g.on_device.is_none());
                let kind = if is_nan { "NaN" } else { "an infinite number" };
                let is_complex = self.entries[index].info.dtype.is_complex();
                let got = at_hand.map_or_else(|| kind.into(), |g| guard::found_in(g, is_complex));
                Err(self.nonfinite(index, &got))
            }
            None => {
                let place = self.place_of("step");
                Err(Error::refuse(ErrorKind::Nonfinite, place, "gradients", "finite", "some that are not"))
            }
        }
    }

    /// Grows whenever host slots are allocated, replaced or dropped, so that a caller can keep a map of them.
    pub fn allocations(&self) -> u64 {
        self.allocations
    }

    /// Whether a panic or a lost device interrupted a step.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// For tests: a weaker instruction set and another chunk on the CPU.
    #[doc(hidden)]
    pub fn force_cpu(&mut self, isa: cpu::Isa, chunk: usize) {
        match &mut self.backend {
            Backend::Cpu(executor) => executor.force(isa, chunk),
            #[cfg(feature = "gpu")]
            Backend::Gpu(_) | Backend::GpuVectors(_) => {}
        }
    }

    /// For tests: windows and staging blocks of so many elements, and another chunk, on a GPU. Works until
    /// parameters are added.
    #[cfg(feature = "gpu")]
    #[doc(hidden)]
    pub fn force_gpu(&mut self, window: usize, chunk: usize) {
        match &mut self.backend {
            Backend::Cpu(_) => {}
            Backend::Gpu(executor) => executor.force(window, chunk),
            Backend::GpuVectors(space) => space.force(window),
        }
    }

    /// For tests: loses the device.
    #[cfg(feature = "gpu")]
    #[doc(hidden)]
    pub fn force_loss(&self) {
        match &self.backend {
            Backend::Cpu(_) => {}
            Backend::Gpu(executor) => executor.force_loss(),
            Backend::GpuVectors(space) => space.force_loss(),
        }
    }

    /// Bytes that parameters, gradients and state take on a GPU.
    #[cfg(feature = "gpu")]
    pub fn device_bytes(&self) -> u64 {
        match &self.backend {
            Backend::Cpu(_) | Backend::GpuVectors(_) => 0,
            Backend::Gpu(executor) => executor.device_bytes(),
        }
    }

    /// Dispatches of the last step on a GPU.
    #[cfg(feature = "gpu")]
    pub fn dispatches(&self) -> usize {
        match &self.backend {
            Backend::Cpu(_) | Backend::GpuVectors(_) => 0,
            Backend::Gpu(executor) => executor.dispatches(),
        }
    }

    /// The device, on a GPU.
    #[cfg(feature = "gpu")]
    pub fn device(&self) -> Result<Option<&gpu::DeviceInfo>> {
        match &self.backend {
            Backend::Cpu(_) => Ok(None),
            Backend::Gpu(executor) => executor.device().map(Some),
            Backend::GpuVectors(space) => space.device().map(Some),
        }
    }

    /// What the steps run on, for people.
    pub fn device_name(&self) -> String {
        match &self.backend {
            Backend::Cpu(executor) => format!("cpu ({} threads)", executor.threads.count()),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.device_name().into(),
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(space) => space.device_name().into(),
        }
    }

    fn place_of(&self, call: &'static str) -> Place {
        Place { optimizer: self.preset.name, call }
    }

    fn place(&self, group: usize) -> String {
        if self.groups.len() > 1 { format!("{} group {group}", self.preset.name) } else { self.preset.name.into() }
    }

    /// Adds a group: hyperparameters that differ from the defaults, and its parameters. On a GPU the memory that
    /// its steps need is made; on an error nothing has changed.
    pub fn add_group(&mut self, hypers: &[(&str, Value)], params: Vec<ParamInfo>) -> Result<usize> {
        let count = self.entries.len();
        let group = self.add_group_without_memory(hypers, params)?;
        match self.reserve() {
            Ok(()) => Ok(group),
            Err(error) => {
                self.entries.truncate(count);
                self.groups.change().truncate(group);
                #[cfg(feature = "gpu")]
                if let Backend::Gpu(executor) = &mut self.backend {
                    executor.truncate(count)?;
                }
                Err(error)
            }
        }
    }

    /// On a GPU: makes the memory that the steps of all parameters need. [`Optimizer::add_group`] does it for one
    /// group; for many it is faster to do it once.
    pub fn reserve(&mut self) -> Result<()> {
        self.settle()?;
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            let (preset, groups) = (self.preset, &self.groups);
            let slots = self.entries.iter().map(|e| preset.needed_slots(&groups[e.group], &e.info.shape));
            noted(executor.reserve(&slots.collect::<Vec<_>>()), &mut self.torn)?;
        }
        Ok(())
    }

    /// [`Optimizer::add_group`], that leaves the memory on a GPU to [`Optimizer::reserve`] or the first step.
    pub fn add_group_without_memory(&mut self, hypers: &[(&str, Value)], params: Vec<ParamInfo>) -> Result<usize> {
        let group = self.groups.len();
        let place = if group == 0 { self.preset.name.into() } else { format!("{} group {group}", self.preset.name) };
        let checked = self.preset.group(&place, hypers)?;
        self.refuse_under_way(self.preset.name)?;
        if let (Method::Closure(_), Some(first)) = (self.preset.method, self.groups.first()) {
            Self::refuse_other_hypers(&place, first, &checked)?;
        }
        if let Method::Tensor(rule) = self.preset.method {
            for (i, info) in params.iter().enumerate() {
                let label = info.label(self.entries.len() + i);
                rule.accept(self.preset.name, &label, &info.shape, info.dtype)?;
            }
        }
        if let (Sparse::Required, Some((i, info))) =
            (self.preset.declaration().sparse, params.iter().enumerate().find(|(_, info)| info.dtype.is_complex()))
        {
            let label = info.label(self.entries.len() + i);
            return Err(Error::refuse(ErrorKind::Type, self.preset.name, label, "of real numbers", info.dtype));
        }
        #[cfg(feature = "gpu")]
        match &mut self.backend {
            Backend::Cpu(_) => {}
            Backend::Gpu(executor) => executor.add(&params)?,
            Backend::GpuVectors(space) => space.accept(&params, self.entries.len())?,
        }
        let (slots, scalars) = (self.preset.declaration().slots.len(), self.preset.first_scalars());
        let preset = self.preset;
        let entry = |info: ParamInfo| {
            let possible = preset.possible_slots(&info.shape);
            Entry { possible, ..Entry::new(info, group, slots, scalars) }
        };
        self.entries.extend(params.into_iter().map(entry));
        self.groups.change().push(checked);
        self.resize_minimizer();
        Ok(group)
    }

    /// Sets hyperparameters of a group; on an error the old values stay.
    pub fn set_hypers(&mut self, group: usize, changes: &[(&str, Value)]) -> Result<()> {
        let place = self.place(group);
        self.preset.set(&place, &mut self.groups.change()[group], changes)
    }

    fn check(&self, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        self.check_whole("step")?;
        let refuse = |kind, name: String, allowed: String, got: String| {
            Err(Error::refuse(kind, self.place_of("step"), name, allowed, got))
        };
        for (what, count) in [("parameters", params.len()), ("gradients", gradients.len())] {
            if count != self.entries.len() {
                return refuse(
                    ErrorKind::Value,
                    what.into(),
                    format!("{} arrays", self.entries.len()),
                    count.to_string(),
                );
            }
        }
        let place = self.place_of("step");
        for (i, ((entry, p), g)) in self.entries.iter().zip(params).zip(gradients).enumerate() {
            if g.is_some() && entry.step == u64::MAX {
                return refuse(
                    ErrorKind::Value,
                    format!("step of {}", entry.label(i)),
                    "below 2^64 - 1".into(),
                    entry.step.to_string(),
                );
            }
            fits(place, || entry.label(i), entry, &p.raw)?;
            if let Some(g) = g {
                self.check_gradient(place, i, g)?;
            }
        }
        Ok(())
    }

    /// Refuses where an earlier call left parameters or state that nobody knows.
    fn check_whole(&self, call: &'static str) -> Result<()> {
        self.refuse_torn(call)?;
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &self.backend {
            executor.refuse_lost(&self.place_of(call).to_string(), |index| self.entries[index].label(index))?;
        }
        Ok(())
    }

    fn refuse_torn(&self, call: &'static str) -> Result<()> {
        if !self.torn {
            return Ok(());
        }
        let sentence = format!("{}: an earlier step was interrupted half-way", self.place_of(call));
        Err(Error::plain(ErrorKind::Torn, sentence).with_remedy("restore the parameters and call load_state_dict"))
    }

    fn check_gradient(&self, place: Place, i: usize, g: &TensorRef<'_>) -> Result<()> {
        let entry = &self.entries[i];
        let Entry { info, group, .. } = entry;
        let label = || format!("gradient of {}", entry.label(i));
        if g.on_device.is_some() && matches!(self.backend, Backend::Cpu(_)) {
            return Err(Error::refuse(ErrorKind::Type, place, label(), "in the host's memory", "one on a device"));
        }
        let declared = self.preset.declaration().sparse;
        let elements = match (&g.rows, declared) {
            (None, Sparse::Required) => {
                return Err(Error::refuse(ErrorKind::Type, place, label(), "sparse", "a dense one")
                    .with_remedy("use Adam for dense gradients"));
            }
            (None, _) => entry.reals,
            (Some(_), Sparse::Refused) => {
                return Err(Error::refuse(ErrorKind::Type, place, label(), "dense", "a sparse one")
                    .with_remedy("use SparseAdam, SGD, Adagrad, LBFGS or ConjugateGradient for sparse gradients"));
            }
            (Some(rows), _) => {
                if let Some(Value::Float(decay)) = self.groups[*group].get("weight_decay")
                    && decay != 0.0
                {
                    return Err(Error::refuse(
                        ErrorKind::Value,
                        place,
                        "weight_decay",
                        "0 with sparse gradients",
                        Value::Float(decay),
                    ));
                }
                if rows.end() > info.reals() {
                    let allowed = format!("within the {} elements", info.reals());
                    return Err(Error::refuse(ErrorKind::Value, place, label(), allowed, rows.end()));
                }
                rows.len()
            }
        };
        if !info.dtype.part().takes(g.raw.dtype) {
            let allowed = match info.dtype.of_state() {
                own if own == info.dtype => own.to_string(),
                wide => format!("{} or {wide}", info.dtype),
            };
            return Err(Error::refuse(ErrorKind::Type, place, label(), allowed, g.raw.dtype));
        }
        if g.raw.len != elements {
            return Err(Error::refuse(ErrorKind::Value, place, label(), format!("of {elements} elements"), g.raw.len));
        }
        Ok(())
    }

    /// One update of every parameter that has a gradient, in place.
    ///
    /// `params` and `gradients` are in order of registration; a gradient of `None` leaves its parameter
    /// and state untouched. With no gradient at all nothing happens. On an error nothing has changed.
    pub fn step(&mut self, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        self.step_with(params, gradients, Besides::default())
    }

    /// [`Optimizer::step`], that does more while the numbers are at hand.
    pub fn step_with(
        &mut self,
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
        besides: Besides<'_, '_>,
    ) -> Result<()> {
        self.scratch.clears_gradients = false;
        self.step_as_said(params, gradients, besides)
    }

    /// [`Optimizer::step`], that sets the gradients to zero, on the CPU while they are at hand: for loops that add to them.
    /// They are cleared also where the update is left out because one is not finite, but not on an error.
    pub fn step_and_clear(
        &mut self,
        params: &mut [TensorMut<'_>],
        gradients: &mut [Option<TensorMut<'_>>],
    ) -> Result<()> {
        // SAFETY: `gradients` are writable, overlap nothing, and are borrowed until the step is over.
        let read = |g: &TensorMut<'_>| unsafe { TensorRef::from_raw(g.raw.clone()) };
        let mut reading = std::mem::take(&mut self.scratch.read);
        reading.clear();
        reading.extend(gradients.iter().map(|g| g.as_ref().map(read)));
        // SAFETY: as above.
        let stepped = unsafe { self.step_and_clear_raw(params, &reading, Besides::default()) };
        // Strides are let go; addresses nobody reads.
        reading.clear();
        self.scratch.read = reading;
        stepped
    }

    /// [`Optimizer::step_and_clear`], of gradients that are known as what is read, that does more besides.
    ///
    /// # Safety
    /// The gradients are writable and overlap neither each other nor anything that the step writes.
    pub unsafe fn step_and_clear_raw(
        &mut self,
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
        besides: Besides<'_, '_>,
    ) -> Result<()> {
        let place = self.place_of("step");
        for (i, gradient) in gradients.iter().enumerate() {
            let got = match gradient {
                Some(g) if g.rows.is_some() => "a sparse one",
                Some(g) if g.on_device.is_some() => "one on a device",
                _ => continue,
            };
            let label = self.entries.get(i).map_or_else(String::new, |entry| entry.label(i));
            return Err(Error::refuse(ErrorKind::Type, place, format!("gradient of {label}"), "an array", got)
                .with_remedy("clear it after the step"));
        }
        self.scratch.clears_gradients = true;
        self.step_as_said(params, gradients, besides)?;
        // Elementwise updates on the CPU did it, unless there was none.
        if self.scratch.clears_gradients {
            for gradient in gradients.iter().flatten() {
                // SAFETY: the caller's duty.
                unsafe { cpu::memory::clear(&gradient.raw, 0, gradient.raw.len) };
            }
        }
        Ok(())
    }

    fn step_as_said(
        &mut self,
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
        besides: Besides<'_, '_>,
    ) -> Result<()> {
        let _arithmetic = cpu::StandardFloats::begin();
        if self.preset.needs_closure() {
            let place = self.place_of("step");
            return Err(Error::refuse(ErrorKind::Type, place, "closure", "given", "gradients alone")
                .with_remedy("a step evaluates loss and gradients several times"));
        }
        self.settle()?;
        self.check(params, gradients)?;
        self.check_besides(params, &besides)?;
        self.squares.clear();
        let Besides { mut average, measures } = besides;
        let verdict = if gradients.iter().any(Option::is_some) { Some(self.judge(gradients)?) } else { None };
        let Some(Verdict::Go(scale)) = verdict else {
            self.skip_count = self.skip_count.saturating_add(u64::from(verdict.is_some()));
            if let Some((average, averages)) = average {
                average.join(averages, params, |_| true);
            }
            return Ok(());
        };
        let before = if measures && !self.measures_in_pass() { self.before(params, gradients)? } else { Vec::new() };
        self.begin_update(scale)?;
        self.torn = true;
        let outcome = match (&self.backend, self.preset.method) {
            (Backend::Cpu(_), Method::Elementwise(rule)) => {
                self.step_cpu(rule, params, gradients, &mut average, measures).map(|()| Made::Whole)
            }
            (Backend::Cpu(_), Method::Tensor(rule)) => self.step_tensors(rule, params, gradients).map(|()| Made::Whole),
            (_, Method::Closure(_)) => unreachable!("refused above"),
            #[cfg(feature = "gpu")]
            (Backend::Gpu(_) | Backend::GpuVectors(_), _) => self.step_gpu(params, gradients),
        };
        self.torn = matches!(&outcome, Err(e) if e.kind() == ErrorKind::DeviceLost);
        if outcome.is_err() {
            self.release_fresh();
        }
        match outcome? {
            Made::Whole => {}
            #[cfg(feature = "gpu")]
            Made::Nothing => return self.left_out(gradients),
            #[cfg(feature = "gpu")]
            Made::Unknown => {
                let entries = self.entries.iter().enumerate().zip(gradients).filter(|(_, g)| g.is_some());
                self.pending = Some(entries.map(|((index, entry), _)| (index, entry.scalars)).collect());
            }
        }
        self.advance(gradients);
        if !before.is_empty() {
            let squares = before
                .into_iter()
                .zip(&*params)
                .filter_map(|(b, p)| Some(b?.until(&p.reading(), &mut self.threads)))
                .collect();
            self.note_squares(gradients, squares);
        }
        if let Some((average, averages)) = average {
            average.join(averages, params, |_| true);
        }
        if self.nonfinite_sync { self.settle_with(gradients) } else { Ok(()) }
    }

    /// Begins anew with what is found out for each step.
    fn begin_update(&mut self, scale: f64) -> Result<()> {
        self.scratch.clear(self.groups.len(), self.entries.len())?;
        self.groups.read(self.preset);
        self.scratch.gradient_scale = scale;
        Ok(())
    }

    /// Counts the update of the parameters that have a gradient.
    fn advance(&mut self, gradients: &[Option<TensorRef<'_>>]) {
        for ((entry, _), row) in
            self.entries.iter_mut().zip(gradients).zip(&self.scratch.row_of).filter(|((_, g), _)| g.is_some())
        {
            entry.step += 1;
            if let Some(row) = row {
                entry.scalars = self.scratch.scalars[*row];
            }
        }
        self.update_count = self.update_count.saturating_add(1);
    }

    fn common(&self) -> Shared {
        Shared {
            gradient_bound: self.guard.clip_value.unwrap_or(f64::INFINITY) * self.grad_scale,
            gradient_scale: self.scratch.gradient_scale / self.grad_scale,
            flush_subnormals: self.flush_subnormals,
            ..Shared::NEUTRAL
        }
    }

    /// Allocates the slots that the step needs. After an error [`Optimizer::release_fresh`] takes them back.
    fn allocate(&mut self, gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        let Self { preset, groups, entries, scratch, allocations, .. } = self;
        for i in 0..entries.len() {
            let entry = &mut entries[i];
            let wanted = match (&gradients[i], groups.reading(entry.group).kernel) {
                (None, _) => SlotSet::EMPTY,
                (Some(_), Some((_, slots))) => slots,
                (Some(_), None) => entry.possible,
            };
            if wanted.iter().all(|k| entry.slots[k].is_some()) {
                scratch.fresh.push(SlotSet::EMPTY);
                continue;
            }
            let shape = entry.info.shape.clone();
            match entry.ensure(wanted, |k| preset.slot_shape(k, &shape)) {
                Ok(fresh) => scratch.fresh.push(fresh),
                // Who called takes back what was allocated.
                Err(error) => return Err(error),
            }
        }
        *allocations += u64::from(scratch.fresh.iter().any(|fresh| !fresh.is_empty()));
        Ok(())
    }

    /// Takes back the slots that were allocated for an update that was not made.
    fn release_fresh(&mut self) {
        let Self { entries, scratch, allocations, jobs_made_at, .. } = self;
        for (entry, fresh) in entries.iter_mut().zip(scratch.fresh.drain(..)) {
            entry.release(fresh);
        }
        *allocations += 1;
        *jobs_made_at = None;
    }

    /// An update, with what is done besides it in its pass; an average that cannot follow it stays.
    fn step_cpu(
        &mut self,
        rule: RuleId,
        params: &[TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
        average: &mut Option<(&mut Self, &mut [TensorMut<'_>])>,
        measures: bool,
    ) -> Result<()> {
        self.prepare(rule, params, gradients)?;
        let mut squares = measures.then(Vec::new);
        let following = average.as_ref().and_then(|(average, _)| self.can_follow(average, gradients));
        let mut follower = match following {
            Some(rule) => average.take().map(|(average, averages)| (rule, average, averages)),
            None => None,
        };
        let mut followers = None;
        if let Some((rule, average, averages)) = &mut follower {
            average.begin_update(1.0)?;
            average.prepare(*rule, averages, &readings(params, |i| gradients[i].is_some()))?;
            average.torn = true;
            let Self { backend, scratch, .. } = &mut **average;
            followers = Some((backend.cpu().jobs(), &scratch.rows[..]));
        }
        let besides = cpu::Besides { followers, squares: squares.as_mut() };
        let Self { backend, scratch, threads, .. } = self;
        // SAFETY: TensorMut and TensorRef promise valid memory without overlap, `check` compared lengths,
        // rows and dtypes, and the slots were allocated for exactly these. Gradients are cleared where
        // `step_and_clear_raw` was promised that they may be. An average reads the parameter of its own job.
        let executed = unsafe { backend.cpu().execute(&scratch.rows, besides) };
        for (job, squares) in backend.cpu().jobs().iter().zip(squares.iter_mut().flatten()) {
            if job.rows.is_some() {
                // The rows are not all of it.
                squares.parameter = cpu::squares_of(&params[job.index].reading(), threads);
            }
        }
        if backend.cpu().jobs().iter().any(|job| job.rows.is_some()) {
            // Rows are of one step: nothing of them is kept.
            backend.cpu().clear();
        }
        if let Some((_, average, averages)) = follower {
            average.torn = false;
            executed?;
            average.advance(&readings(params, |i| gradients[i].is_some()));
            if gradients.iter().any(Option::is_none) {
                average.join(averages, params, |i| gradients[i].is_none());
            }
        } else {
            executed?;
        }
        self.scratch.clears_gradients = false;
        if let Some(squares) = squares {
            self.note_squares(gradients, squares);
        }
        Ok(())
    }

    /// The jobs of an update and their rows.
    fn prepare(&mut self, rule: RuleId, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        if !self.renew_jobs(params, gradients) {
            self.make_jobs(rule, params, gradients)?;
        }
        let common = self.common();
        let Self { groups, entries, backend, scratch, .. } = self;
        let executor = backend.cpu();
        let clears_gradients = scratch.clears_gradients;
        for job in executor.jobs_mut() {
            let entry = &entries[job.index];
            let (hypers, reading) = (&groups[entry.group], groups.reading(entry.group));
            let at = Moment { step: entry.step + 1, fresh: scratch.fresh[job.index] };
            let compute = |scalars: &mut ScalarSlots| Row {
                shared: Shared { clears_gradients, ..reading.shared(common) },
                coefficients: rule.coefficients(hypers, at, scalars),
            };
            job.row = scratch.row(job.index, entry, reading.first_alike, at, compute);
        }
        Ok(())
    }

    /// Brings the jobs of the step before up to date with this step's arrays; whether that is all it takes.
    fn renew_jobs(&mut self, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> bool {
        let is_current = self.jobs_made_at == Some((self.allocations, self.groups.changes()));
        let is_renewed = is_current && self.backend.cpu().renew(params, gradients);
        if is_renewed {
            self.scratch.fresh.resize(self.entries.len(), SlotSet::EMPTY);
        }
        is_renewed
    }

    /// Allocates the slots of the step and makes its jobs; their rows are still to be found.
    fn make_jobs(&mut self, rule: RuleId, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        self.jobs_made_at = None;
        self.allocate(gradients)?;
        let pushed = self.push_jobs(rule, params, gradients);
        if pushed.is_err() {
            self.backend.cpu().clear();
        }
        pushed
    }

    fn push_jobs(&mut self, rule: RuleId, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        let Self { groups, entries, backend, scratch, .. } = self;
        let executor = backend.cpu();
        executor.clear();
        for (index, entry) in entries.iter().enumerate() {
            let Some(gradient) = &gradients[index] else { continue };
            let hypers = &groups[entry.group];
            let Some((facts, _)) = groups.reading(entry.group).kernel else { unreachable!("the rule is elementwise") };
            let mut slots = [std::ptr::null_mut(); MAX_SLOTS];
            for (pointer, &k) in slots.iter_mut().zip(facts.slots) {
                *pointer = entry.slots[k].as_ref().map_or(std::ptr::null_mut(), |slot| slot.raw().ptr);
            }
            let (mut g, mut rows) = (gradient.raw.clone(), gradient.rows.clone());
            if let Some(touched) = rows.take_if(|_| !facts.rests || !scratch.fresh[index].is_empty()) {
                let dense = Buffer::zeroed(entry.reals, g.dtype)?;
                // SAFETY: `check` compared the rows with gradient and parameter, whose length the buffer has.
                unsafe { cpu::memory::scatter(&g, &touched, &dense.raw()) };
                g = dense.raw();
                scratch.dense.push(dense);
            }
            let pass = rule.with_kernel(hypers, executor.select(entry.info.dtype, g.dtype));
            executor.push(cpu::Job { index, pass, row: 0, p: params[index].raw.clone(), g, slots, rows });
        }
        executor.reserve()?;
        self.jobs_made_at = self.scratch.dense.is_empty().then_some((self.allocations, self.groups.changes()));
        Ok(())
    }

    fn step_tensors(
        &mut self,
        rule: TensorRuleId,
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
    ) -> Result<()> {
        self.allocate(gradients)?;
        let common = self.common();
        let Self { groups, entries, backend, scratch, .. } = self;
        let executor = backend.cpu();
        let mut jobs = executor.tensor_jobs();
        for (i, entry) in entries.iter().enumerate() {
            let Some(gradient) = &gradients[i] else { continue };
            let hypers = &groups[entry.group];
            let slot = |k: usize| entry.slots.get(k)?.as_ref().map(|slot| slot.raw());
            jobs.push(cpu::TensorJob {
                hypers,
                at: Moment { step: entry.step + 1, fresh: scratch.fresh[i] },
                shared: groups.reading(entry.group).shared(common),
                shape: &entry.info.shape,
                dtype: entry.info.dtype,
                p: params[i].raw.clone(),
                g: gradient.raw.clone(),
                slots: std::array::from_fn(|k| slot(k).map_or(std::ptr::null_mut(), |raw| raw.ptr)),
                lengths: std::array::from_fn(|k| slot(k).map_or(0, |raw| raw.len)),
                is_done: false,
            });
        }
        // SAFETY: as in `step_cpu`.
        unsafe { executor.execute_tensors(rule, jobs) }
    }

    #[cfg(feature = "gpu")]
    fn step_gpu(&mut self, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<Made> {
        let common = self.common();
        let bounds = self.guard.bounds(self.grad_scale);
        let Self { preset, groups, entries, backend, scratch, threads, .. } = self;
        let Backend::Gpu(executor) = backend else { unreachable!("called for the GPU backend") };
        let mut jobs = Vec::new();
        let mut elements = 0;
        for (index, entry) in entries.iter().enumerate() {
            let Some(gradient) = &gradients[index] else { continue };
            refuse_sparse(format_args!("{}.step", preset.name), "dense on the GPU", entry, index, gradient)?;
            let (hypers, reading) = (&groups[entry.group], groups.reading(entry.group));
            let fresh = executor.missing(index, preset.needed_slots(hypers, &entry.info.shape));
            let at = Moment { step: entry.step + 1, fresh };
            jobs.push(match preset.method {
                Method::Elementwise(rule) => {
                    let Some((kernel, _)) = reading.kernel else { unreachable!("the rule is elementwise") };
                    let compute = |scalars: &mut ScalarSlots| Row {
                        shared: reading.shared(common),
                        coefficients: rule.coefficients(hypers, at, scalars),
                    };
                    let row = scratch.row(index, entry, reading.first_alike, at, compute);
                    gpu::Job { index, row, kernel, turns: 0, fresh }
                }
                Method::Tensor(rule) => {
                    let ParamInfo { shape, dtype, .. } = &entry.info;
                    let coefficients = (rule.program().row)(hypers, at, shape, *dtype);
                    // Decay is the rule's own.
                    let shared = Shared { decay: Shared::NEUTRAL.decay, ..reading.shared(common) };
                    scratch.rows.push(Row { shared, coefficients });
                    let (row, turns) = (scratch.rows.len() - 1, (rule.program().turns)(hypers));
                    gpu::Job { index, row, kernel: rule.facts(), turns, fresh }
                }
                Method::Closure(_) => unreachable!("`gpu` refused it"),
            });
            elements += entry.info.reals();
        }
        let pool = threads.pool(elements >= COPY_IN_PARALLEL);
        let outcome = executor.step(&bounds, &scratch.rows, &jobs, params, gradients, pool)?;
        self.gradient_norm = None;
        self.norm_on_device = bounds.max_norm.is_some();
        Ok(match outcome {
            gpu::Outcome::Applied => Made::Whole,
            gpu::Outcome::Skipped => Made::Nothing,
            gpu::Outcome::Pending => Made::Unknown,
        })
    }

    /// Whether the device's value of a parameter is ahead of the host's array: after a step of a resident
    /// parameter, until [`Optimizer::sync`] or [`Optimizer::host_written`]. Never on the CPU, nor of
    /// methods that take a closure.
    pub fn host_is_stale(&self, index: usize) -> bool {
        match &self.backend {
            Backend::Cpu(_) => {
                debug_assert!(index < self.entries.len());
                false
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.host_is_stale(index),
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => false,
        }
    }

    /// Says that the host's array of a resident parameter was written: it is the truth from now on.
    pub fn host_written(&mut self, index: usize) {
        match &mut self.backend {
            Backend::Cpu(_) => debug_assert!(index < self.entries.len()),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.host_written(index),
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => {}
        }
    }

    /// Brings resident parameters' values to the host's arrays where the device's are ahead, each named by its
    /// index; else does nothing. Reports what became of the last step, as [`Optimizer::settle`] does.
    pub fn sync(&mut self, arrays: &mut [(usize, &mut TensorMut<'_>)]) -> Result<()> {
        let place = self.place_of("sync");
        for (index, array) in &*arrays {
            let entry = &self.entries[*index];
            fits(place, || entry.info.label(*index), entry, &array.raw)?;
        }
        self.settle()?;
        match &mut self.backend {
            Backend::Cpu(_) => Ok(()),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => {
                let elements: usize = arrays.iter().map(|(_, array)| array.raw.len).sum();
                let pool = self.threads.pool(elements >= COPY_IN_PARALLEL);
                let entries = &self.entries;
                noted(
                    executor.sync(&place.to_string(), arrays, pool, |index| entries[index].label(index)),
                    &mut self.torn,
                )
            }
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => Ok(()),
        }
    }

    /// The buffer of one slot, if the host has it, by parameter index and torch's key.
    pub fn slot(&self, index: usize, key: &str) -> Option<Arc<Buffer>> {
        let k = self.slot_index(key)?;
        self.entries.get(index)?.slots[k].clone()
    }

    fn slot_index(&self, key: &str) -> Option<usize> {
        self.preset.declaration().slots.iter().position(|s| s.name == key)
    }

    /// Copies of slots, each named by its parameter's index and k; `None` where a slot does not exist.
    fn read_slots(&mut self, wanted: &[(usize, usize)]) -> Result<Vec<Option<Array>>> {
        let bytes = match &mut self.backend {
            Backend::Cpu(_) => {
                let copied = |&(index, k): &(usize, usize)| {
                    self.entries[index].slots[k].as_ref().map(|slot: &Arc<Buffer>| slot.to_bytes()).transpose()
                };
                wanted.iter().map(copied).collect::<Result<_>>()?
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => noted(executor.read_slots(wanted), &mut self.torn)?,
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => vec![None; wanted.len()],
        };
        let array = |(&(index, k), bytes): (&(usize, usize), Option<Vec<u8>>)| {
            let (shape, dtype) = self.slot_layout(index, k);
            Some(Array { dtype, shape, bytes: bytes? })
        };
        Ok(wanted.iter().zip::<Vec<_>>(bytes).map(array).collect())
    }

    /// A copy of one slot by torch's key, wherever it lives.
    pub fn slot_array(&mut self, index: usize, key: &str) -> Result<Option<Array>> {
        self.settle()?;
        match self.slot_index(key) {
            Some(k) if index < self.entries.len() => Ok(self.read_slots(&[(index, k)])?.pop().flatten()),
            _ => Ok(None),
        }
    }

    /// Shape and dtype of slot k of a parameter, as its state shows it.
    fn slot_layout(&self, index: usize, k: usize) -> (Vec<usize>, Dtype) {
        let info = &self.entries[index].info;
        (self.preset.slot_shape(k, &info.shape).unwrap_or_default(), info.dtype.of_state())
    }

    /// Shape and dtype of a slot by torch's key, as its state shows it.
    pub fn slot_form(&self, index: usize, key: &str) -> Option<(Vec<usize>, Dtype)> {
        Some(self.slot_layout(index, self.slot_index(key)?))
    }

    /// A scalar slot by torch's key.
    pub fn scalar(&self, index: usize, key: &str) -> Option<f64> {
        let k = self.preset.declaration().scalars.iter().position(|s| s.name == key)?;
        Some(self.entries.get(index)?.scalars[k])
    }

    /// Sets a scalar slot by torch's key; one that does not exist stays so.
    pub fn set_scalar(&mut self, index: usize, key: &str, value: f64) {
        if let Some(k) = self.preset.declaration().scalars.iter().position(|s| s.name == key) {
            self.entries[index].scalars[k] = value;
        }
    }

    /// The keys of the slots that a parameter has, in declaration order.
    pub fn slot_keys(&self, index: usize) -> Vec<&'static str> {
        let has = |k: usize| match &self.backend {
            Backend::Cpu(_) => self.entries[index].slots[k].is_some(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.has_slot(index, k),
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(_) => false,
        };
        let slots = self.preset.declaration().slots.iter().enumerate().filter(|(k, _)| has(*k)).map(|(_, s)| s.name);
        slots.chain(self.joint_names(index)).collect()
    }

    /// Sets how messages call a parameter.
    pub fn set_title(&mut self, index: usize, title: &str) {
        self.entries[index].title = Some(title.to_owned());
    }

    /// Sets a parameter's step count. Its slots stay.
    pub fn set_step(&mut self, index: usize, step: u64) {
        self.entries[index].step = step;
    }

    /// Returns a parameter to step 0 without state.
    ///
    /// Where all parameters share one state, it is emptied.
    pub fn reset(&mut self, index: usize) -> Result<()> {
        self.settle()?;
        self.refuse_under_way(&self.place_of("reset").to_string())?;
        self.reset_minimizer();
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            executor.clear_slots(index)?;
        }
        self.allocations += 1;
        self.entries[index].step = 0;
        self.entries[index].slots.fill(None);
        self.entries[index].scalars = self.preset.first_scalars();
        Ok(())
    }

    /// Whether a parameter has state to show: as in torch, one that was never updated has none, and an
    /// optimizer that shows no step has none without slots.
    pub fn has_state(&self, index: usize) -> bool {
        self.entries[index].step > 0 && (self.preset.declaration().shows_step || !self.slot_keys(index).is_empty())
    }
}

/// Where an error of a call is placed; a step makes no text of it that nobody reads.
#[derive(Debug, Clone, Copy)]
struct Place {
    optimizer: &'static str,
    call: &'static str,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.optimizer, self.call)
    }
}

/// Whether an array is what was registered.
fn fits(place: Place, label: impl Fn() -> String, Entry { info, reals, .. }: &Entry, raw: &RawTensor) -> Result<()> {
    if raw.dtype != info.dtype.part() {
        return Err(Error::refuse(ErrorKind::Type, place, label(), info.dtype.part(), raw.dtype));
    }
    if raw.len != *reals {
        return Err(Error::refuse(ErrorKind::Value, place, label(), format!("of {reals} elements"), raw.len));
    }
    Ok(())
}

#[cfg(feature = "gpu")]
fn cpu_only(preset: &Preset) -> Error {
    Error::refuse(ErrorKind::Value, preset.name, "backend", "\"cpu\"", "\"gpu\"")
        .with_remedy("this optimizer has no GPU form")
}

/// What a step made.
enum Made {
    /// The update.
    Whole,
    /// Nothing: the device left it out.
    #[cfg(feature = "gpu")]
    Nothing,
    /// One or the other.
    #[cfg(feature = "gpu")]
    Unknown,
}

/// Elements from which copies to and from the device are worth several threads.
#[cfg(feature = "gpu")]
const COPY_IN_PARALLEL: usize = 1 << 18;

/// Notes when an outcome says that what lies on the device is not known any more.
#[cfg(feature = "gpu")]
fn noted<T>(outcome: Result<T>, torn: &mut bool) -> Result<T> {
    *torn |= matches!(&outcome, Err(e) if e.kind() == ErrorKind::DeviceLost);
    outcome
}

fn refuse_sparse(
    place: impl fmt::Display,
    allowed: &str,
    entry: &Entry,
    index: usize,
    gradient: &TensorRef<'_>,
) -> Result<()> {
    if gradient.rows.is_none() {
        return Ok(());
    }
    let label = format!("gradient of {}", entry.label(index));
    Err(Error::refuse(ErrorKind::Type, place, label, allowed, "a sparse one")
        .with_remedy("use backend=\"cpu\", or give it with zeros"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::Dtype;

    #[test]
    fn a_torn_optimizer_refuses_until_state_is_loaded() {
        let mut adam = Optimizer::cpu("Adam", &Options::default()).unwrap();
        adam.add_group(&[], vec![ParamInfo::vector("w", 2, Dtype::F32)]).unwrap();
        let (mut p, g) = ([1.0f32; 2], [1.0f32; 2]);
        adam.step(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())]).unwrap();
        let (saved, kept) = (adam.state_dict().unwrap(), p);
        adam.torn = true;
        assert_eq!(adam.state_dict().unwrap_err().kind(), ErrorKind::Torn);
        let error = adam.step(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Torn);
        assert_eq!(
            error.to_string(),
            "Adam.step: an earlier step was interrupted half-way; restore the parameters and call load_state_dict"
        );
        assert_eq!(p, kept);
        adam.load_state_dict(&saved).unwrap();
        adam.step(&mut [p.as_mut_slice().into()], &[Some(g.as_slice().into())]).unwrap();
        assert!(p != kept && !adam.is_torn());
    }
}
