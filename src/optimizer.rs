//! An optimizer: a preset, its groups, the store, and an executor.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cpu;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::hyper::{Hypers, Value};
#[cfg(feature = "gpu")]
use crate::rule::Facts;
use crate::rule::{Moment, Row, Shared};
use crate::rules::Preset;
use crate::store::{Array, Entry, GroupState, ParamInfo, ParamState, STATE_FORMAT, StateDict};
use crate::tensor::{Buffer, RawTensor, TensorMut, TensorRef};

/// Where and how steps run; the same for all groups.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads on the CPU; `None` for as many as the process may use.
    pub threads: Option<usize>,
    /// Whether slots below the smallest normal number are stored as zero.
    pub flush_subnormals: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: None, flush_subnormals: true }
    }
}

#[derive(Debug)]
enum Backend {
    Cpu(cpu::Executor),
    #[cfg(feature = "gpu")]
    Gpu(Box<gpu::Executor>),
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
    groups: Vec<Hypers>,
    entries: Vec<Entry>,
    backend: Backend,
    flush_subnormals: bool,
    update_count: u64,
    allocations: u64,
    torn: bool,
    scratch: Scratch,
}

/// Checked state of one parameter: its step and its slots in declaration order.
type Loaded<'s> = (u64, Vec<Option<&'s Array>>);

/// Reused from step to step.
#[derive(Debug, Default)]
struct Scratch {
    rows: Vec<Row>,
    /// By group: the last moment asked for and its row.
    latest: Vec<Option<(Moment, usize)>>,
    fresh: Vec<u8>,
}

impl Scratch {
    fn clear(&mut self, groups: usize) {
        self.rows.clear();
        self.fresh.clear();
        self.latest.clear();
        self.latest.resize(groups, None);
    }

    /// Index of the coefficient row of a group at a moment. Parameters of a group mostly are at the same
    /// moment; where they alternate a row may stand twice.
    fn row(&mut self, group: usize, at: Moment, compute: impl FnOnce() -> Row) -> usize {
        if let Some((known, index)) = self.latest[group]
            && known == at
        {
            return index;
        }
        self.rows.push(compute());
        self.latest[group] = Some((at, self.rows.len() - 1));
        self.rows.len() - 1
    }
}

impl Optimizer {
    /// An optimizer by its registry name, on the CPU.
    pub fn cpu(name: &str, options: &Options) -> Result<Self> {
        let executor = cpu::Executor::new(cpu::Threads::new(options.threads));
        Ok(Self::with_backend(Preset::find(name)?, Backend::Cpu(executor), options))
    }

    /// An optimizer by its registry name, on a GPU.
    #[cfg(feature = "gpu")]
    pub fn gpu(name: &str, options: &Options, device: &gpu::DeviceRequest) -> Result<Self> {
        let preset = Preset::find(name)?;
        let executor = gpu::Executor::new(preset.name, preset.rule, device)?;
        Ok(Self::with_backend(preset, Backend::Gpu(Box::new(executor)), options))
    }

    fn with_backend(preset: &'static Preset, backend: Backend, options: &Options) -> Self {
        Self {
            preset,
            groups: Vec::new(),
            entries: Vec::new(),
            backend,
            flush_subnormals: options.flush_subnormals,
            update_count: 0,
            allocations: 0,
            torn: false,
            scratch: Scratch::default(),
        }
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

    /// Applied updates, the clock of schedules.
    pub fn update_count(&self) -> u64 {
        self.update_count
    }

    /// Grows whenever host slots are allocated or replaced, so that a caller can keep a map of them.
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
            Backend::Gpu(_) => {}
        }
    }

    /// For tests: windows and staging blocks of so many elements, and another chunk, on a GPU. Works until
    /// the first step or load.
    #[cfg(feature = "gpu")]
    #[doc(hidden)]
    pub fn force_gpu(&mut self, window: usize, chunk: usize) {
        if let Backend::Gpu(executor) = &mut self.backend {
            executor.force(window, chunk);
        }
    }

    /// The device, on a GPU.
    #[cfg(feature = "gpu")]
    pub fn device(&self) -> Result<Option<&gpu::DeviceInfo>> {
        match &self.backend {
            Backend::Cpu(_) => Ok(None),
            Backend::Gpu(executor) => executor.device().map(Some),
        }
    }

    /// What the steps run on, for people.
    pub fn device_name(&self) -> String {
        match &self.backend {
            Backend::Cpu(executor) => format!("cpu ({} threads)", executor.threads.count()),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.device_name().into(),
        }
    }

    fn place(&self, group: usize) -> String {
        if self.groups.len() > 1 { format!("{} group {group}", self.preset.name) } else { self.preset.name.into() }
    }

    /// Adds a group: hyperparameters that differ from the defaults, and its parameters.
    pub fn add_group(&mut self, hypers: &[(&str, Value)], params: Vec<ParamInfo>) -> Result<usize> {
        let group = self.groups.len();
        let mut checked = self.preset.hypers();
        let place = if group == 0 { self.preset.name.into() } else { format!("{} group {group}", self.preset.name) };
        self.preset.set(&place, &mut checked, hypers)?;
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            executor.add(&params)?;
        }
        let slots = self.preset.declaration().slots.len();
        self.entries.extend(params.into_iter().map(|info| Entry { info, group, step: 0, slots: vec![None; slots] }));
        self.groups.push(checked);
        Ok(group)
    }

    /// Sets hyperparameters of a group; on an error the old values stay.
    pub fn set_hypers(&mut self, group: usize, changes: &[(&str, Value)]) -> Result<()> {
        let place = self.place(group);
        self.preset.set(&place, &mut self.groups[group], changes)
    }

    fn check(&self, params: &[TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        let refuse = |kind, name: String, allowed: String, got: String| {
            Err(Error::refuse(kind, format!("{}.step", self.preset.name), name, allowed, got))
        };
        if self.torn {
            return Err(Error::plain(
                ErrorKind::Torn,
                format!("{}.step: an earlier step was interrupted half-way", self.preset.name),
            )
            .with_remedy("restore the parameters and call load_state_dict"));
        }
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
        let place = format!("{}.step", self.preset.name);
        for (i, ((entry, p), g)) in self.entries.iter().zip(params).zip(gradients).enumerate() {
            if g.is_some() && entry.step == u64::MAX {
                return refuse(
                    ErrorKind::Value,
                    format!("step of {}", entry.info.label(i)),
                    "below 2^64 - 1".into(),
                    entry.step.to_string(),
                );
            }
            let arrays = [("", Some(&p.raw)), ("gradient of ", g.as_ref().map(|g| &g.raw))];
            for (what, raw) in arrays.into_iter().filter_map(|(what, raw)| Some((what, raw?))) {
                let label = || format!("{what}{}", entry.info.label(i));
                fits(&place, label, &entry.info, raw)?;
            }
        }
        Ok(())
    }

    /// One update of every parameter that has a gradient, in place.
    ///
    /// `params` and `gradients` are in order of registration; a gradient of `None` leaves its parameter
    /// and state untouched. With no gradient at all nothing happens. On an error nothing has changed.
    pub fn step(&mut self, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        self.check(params, gradients)?;
        if gradients.iter().all(Option::is_none) {
            return Ok(());
        }
        self.torn = true;
        let outcome = match &self.backend {
            Backend::Cpu(_) => self.step_cpu(params, gradients),
            #[cfg(feature = "gpu")]
            Backend::Gpu(_) => self.step_gpu(params, gradients),
        };
        self.torn = matches!(&outcome, Err(e) if e.kind() == ErrorKind::DeviceLost);
        outcome?;
        for (entry, _) in self.entries.iter_mut().zip(gradients).filter(|(_, g)| g.is_some()) {
            entry.step += 1;
        }
        self.update_count += 1;
        Ok(())
    }

    fn step_cpu(&mut self, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        let Self { preset, groups, entries, backend, scratch, flush_subnormals, allocations, .. } = self;
        #[cfg_attr(not(feature = "gpu"), allow(irrefutable_let_patterns, reason = "one backend without gpu"))]
        let Backend::Cpu(executor) = backend else { unreachable!("called for the CPU backend") };
        scratch.clear(groups.len());
        let active = |i: usize| gradients[i].is_some();
        for i in 0..entries.len() {
            let count = if active(i) { preset.slot_count(&groups[entries[i].group]) } else { 0 };
            match entries[i].ensure(count) {
                Ok(fresh) => scratch.fresh.push(fresh),
                Err(error) => {
                    // A half-allocated entry holds only zeros; an unallocated one reads the same later.
                    for (entry, &fresh) in entries.iter_mut().zip(&scratch.fresh) {
                        entry.release(fresh);
                    }
                    return Err(error);
                }
            }
        }
        *allocations += u64::from(scratch.fresh.iter().any(|&fresh| fresh != 0));
        executor.clear();
        for (i, entry) in entries.iter().enumerate() {
            let Some(gradient) = &gradients[i] else { continue };
            let hypers = &groups[entry.group];
            let at = Moment { step: entry.step + 1, fresh: scratch.fresh[i] };
            let row = scratch.row(entry.group, at, || row(preset, hypers, at, *flush_subnormals));
            let pass = preset.rule.with_kernel(hypers, executor.select(entry.info.dtype));
            let mut slots = [std::ptr::null_mut(); crate::rule::MAX_SLOTS];
            for (pointer, slot) in slots.iter_mut().zip(entry.slots.iter().flatten()) {
                *pointer = slot.raw().ptr;
            }
            executor.push(pass, row, params[i].raw.clone(), gradient.raw.clone(), slots);
        }
        // SAFETY: TensorMut and TensorRef promise valid memory without overlap, `check` compared lengths
        // and dtypes, and the slots were allocated for exactly these.
        unsafe { executor.execute(&scratch.rows) };
        executor.clear();
        Ok(())
    }

    #[cfg(feature = "gpu")]
    fn step_gpu(&mut self, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<()> {
        let Self { preset, groups, entries, backend, scratch, flush_subnormals, .. } = self;
        let Backend::Gpu(executor) = backend else { unreachable!("called for the GPU backend") };
        scratch.clear(groups.len());
        let mut jobs = Vec::new();
        for (index, entry) in entries.iter().enumerate().filter(|(i, _)| gradients[*i].is_some()) {
            let hypers = &groups[entry.group];
            let kernel = preset.rule.with_kernel(hypers, Facts);
            let fresh = executor.missing(index, kernel.slots);
            let at = Moment { step: entry.step + 1, fresh };
            let row = scratch.row(entry.group, at, || row(preset, hypers, at, *flush_subnormals));
            jobs.push(gpu::Job { index, row, kernel, fresh });
        }
        executor.step(&scratch.rows, &jobs, params, gradients)
    }

    /// Whether the device's value of a parameter is ahead of the host's array: after a step of a resident
    /// parameter, until [`Optimizer::sync`] or [`Optimizer::host_written`]. Never on the CPU.
    pub fn host_is_stale(&self, index: usize) -> bool {
        match &self.backend {
            Backend::Cpu(_) => {
                debug_assert!(index < self.entries.len());
                false
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.host_is_stale(index),
        }
    }

    /// Says that the host's array of a resident parameter was written: it is the truth from now on.
    pub fn host_written(&mut self, index: usize) {
        match &mut self.backend {
            Backend::Cpu(_) => debug_assert!(index < self.entries.len()),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.host_written(index),
        }
    }

    /// Brings a resident parameter's value to the host's array if the device's is ahead; else does nothing.
    pub fn sync(&mut self, index: usize, array: &mut TensorMut<'_>) -> Result<()> {
        let place = format!("{}.sync", self.preset.name);
        let info = &self.entries[index].info;
        fits(&place, || info.label(index), info, &array.raw)?;
        match &mut self.backend {
            Backend::Cpu(_) => Ok(()),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.sync(index, array),
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
    fn read_slots(&self, wanted: &[(usize, usize)]) -> Result<Vec<Option<Array>>> {
        let bytes = match &self.backend {
            Backend::Cpu(_) => {
                wanted.iter().map(|&(index, k)| Some(self.entries[index].slots[k].as_ref()?.to_bytes())).collect()
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.read_slots(wanted)?,
        };
        let array = |(&(index, _), bytes): (&(usize, usize), Option<Vec<u8>>)| {
            let info = &self.entries[index].info;
            Some(Array { dtype: info.dtype, shape: info.shape.clone(), bytes: bytes? })
        };
        Ok(wanted.iter().zip::<Vec<_>>(bytes).map(array).collect())
    }

    /// A copy of one slot by torch's key, wherever it lives.
    pub fn slot_array(&self, index: usize, key: &str) -> Result<Option<Array>> {
        match self.slot_index(key) {
            Some(k) if index < self.entries.len() => Ok(self.read_slots(&[(index, k)])?.pop().flatten()),
            _ => Ok(None),
        }
    }

    /// The keys of the slots that a parameter has, in declaration order.
    pub fn slot_keys(&self, index: usize) -> Vec<&'static str> {
        let has = |k: usize| match &self.backend {
            Backend::Cpu(_) => self.entries[index].slots[k].is_some(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.has_slot(index, k),
        };
        let slots = self.preset.declaration().slots;
        slots.iter().enumerate().filter(|(k, _)| has(*k)).map(|(_, s)| s.name).collect()
    }

    /// Sets a parameter's step count. Its slots stay.
    pub fn set_step(&mut self, index: usize, step: u64) {
        self.entries[index].step = step;
    }

    /// Returns a parameter to step 0 without state.
    pub fn reset(&mut self, index: usize) -> Result<()> {
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            executor.clear_slots(index)?;
        }
        self.entries[index].step = 0;
        self.entries[index].slots.fill(None);
        Ok(())
    }

    /// Whether a parameter has state to show: as in torch, one that was never updated has none, and an
    /// optimizer that shows no step has none without slots.
    pub fn has_state(&self, index: usize) -> bool {
        self.entries[index].step > 0 && (self.preset.declaration().shows_step || !self.slot_keys(index).is_empty())
    }

    /// A copy of everything but the parameters' values.
    pub fn state_dict(&self) -> Result<StateDict> {
        let declared = self.preset.declaration().slots;
        let known: Vec<usize> = (0..self.entries.len()).filter(|&i| self.has_state(i)).collect();
        let wanted: Vec<_> = known.iter().flat_map(|&i| (0..declared.len()).map(move |k| (i, k))).collect();
        let mut arrays = self.read_slots(&wanted)?.into_iter();
        let mut state = BTreeMap::new();
        for i in known {
            let present =
                declared.iter().zip(arrays.by_ref()).filter_map(|(s, array)| Some((s.name.to_owned(), array?)));
            state.insert(i, ParamState { step: self.entries[i].step, slots: present.collect() });
        }
        let groups = self.groups.iter().enumerate().map(|(g, hypers)| {
            let members = || self.entries.iter().enumerate().filter(move |(_, e)| e.group == g);
            GroupState {
                hypers: hypers.iter().map(|(name, value)| (name.to_owned(), value)).collect(),
                params: members().map(|(i, _)| i).collect(),
                param_names: members().map(|(_, e)| e.info.name.clone()).collect(),
            }
        });
        Ok(StateDict {
            optimizer: Some(self.preset.name.to_owned()),
            format: STATE_FORMAT,
            update_count: self.update_count,
            groups: groups.collect(),
            state,
        })
    }

    /// Replaces hyperparameters, steps and slots by those of `saved`, matched by name where both sides
    /// have names, else by position. Everything is checked before anything is written: class, groups,
    /// names, slots, shapes, dtypes and ranges.
    pub fn load_state_dict(&mut self, saved: &StateDict) -> Result<()> {
        let place = format!("{}.load_state_dict", self.preset.name);
        let refuse =
            |kind, name: &str, allowed: String, got: String| Err(Error::refuse(kind, &place, name, allowed, got));
        if let Some(class) = &saved.optimizer
            && class != self.preset.name
        {
            return refuse(ErrorKind::Value, "state", format!("of {}", self.preset.name), format!("of {class}"));
        }
        if saved.format != STATE_FORMAT {
            return refuse(ErrorKind::Value, "format version", STATE_FORMAT.to_string(), saved.format.to_string());
        }
        if saved.groups.len() != self.groups.len() {
            let (want, got) = (self.groups.len(), saved.groups.len());
            return refuse(ErrorKind::Value, "number of parameter groups", want.to_string(), got.to_string());
        }
        let mut groups = self.groups.clone();
        let mut loaded: Vec<Option<Loaded<'_>>> = vec![None; self.entries.len()];
        for (g, from) in saved.groups.iter().enumerate() {
            let changes: Vec<_> = from.hypers.iter().map(|(name, &value)| (name.as_str(), value)).collect();
            self.preset.set(&format!("{place}: group {g}"), &mut groups[g], &changes)?;
            for (i, source) in self.sources(g, from, &place)? {
                if let Some(state) = saved.state.get(&source) {
                    // Where the step means nothing it may be unknown, 0: what has state was updated.
                    loaded[i] = Some((state.step.max(1), self.check_state(i, state, &place)?));
                }
            }
        }
        let mut known = std::collections::BTreeSet::new();
        if let Some(twice) = saved.groups.iter().flat_map(|g| &g.params).find(|source| !known.insert(**source)) {
            return refuse(ErrorKind::Value, "indices of parameters", "different".into(), format!("{twice} twice"));
        }
        if let Some(stray) = saved.state.keys().find(|source| !known.contains(source)) {
            return refuse(ErrorKind::Value, "state", "of parameters in the groups".into(), format!("one for {stray}"));
        }
        self.write_state(&loaded)?;
        self.groups = groups;
        self.update_count = saved.update_count;
        self.torn = false;
        Ok(())
    }

    /// For each parameter of group `g`, the index it has in the saved state.
    fn sources(&self, g: usize, from: &GroupState, place: &str) -> Result<Vec<(usize, usize)>> {
        let members: Vec<usize> = (0..self.entries.len()).filter(|&i| self.entries[i].group == g).collect();
        let refuse =
            |name: String, allowed: String, got: String| Error::refuse(ErrorKind::Value, place, name, allowed, got);
        if from.params.len() != members.len() {
            let (want, got) = (members.len(), from.params.len());
            return Err(refuse(format!("number of parameters in group {g}"), want.to_string(), got.to_string()));
        }
        let names: Option<Vec<&str>> = members.iter().map(|&i| self.entries[i].info.name.as_deref()).collect();
        let (Some(ours), Some(theirs)) = (names, &from.param_names) else {
            return Ok(members.into_iter().zip(from.params.iter().copied()).collect());
        };
        if theirs.len() != from.params.len() {
            return Err(refuse(
                format!("param_names of group {g}"),
                from.params.len().to_string(),
                theirs.len().to_string(),
            ));
        }
        let by_name: BTreeMap<&str, usize> =
            theirs.iter().map(String::as_str).zip(from.params.iter().copied()).collect();
        members
            .into_iter()
            .zip(ours)
            .map(|(i, name)| match by_name.get(name) {
                Some(&source) => Ok((i, source)),
                None => {
                    let (want, got) = (format!("named {}", theirs.join(", ")), format!("one named {name}"));
                    Err(refuse(format!("parameters of group {g}"), want, got))
                }
            })
            .collect()
    }

    fn check_state<'s>(&self, i: usize, state: &'s ParamState, place: &str) -> Result<Vec<Option<&'s Array>>> {
        let info = &self.entries[i].info;
        let declared = self.preset.declaration().slots;
        for (key, array) in &state.slots {
            let label = format!("{key} of {}", info.label(i));
            if !declared.iter().any(|s| s.name == key) {
                let known: Vec<_> = declared.iter().map(|s| s.name).collect();
                let allowed =
                    if known.is_empty() { "absent".to_owned() } else { format!("one of {}", known.join(", ")) };
                return Err(Error::refuse(
                    ErrorKind::Value,
                    place,
                    format!("state key of {}", info.label(i)),
                    allowed,
                    key,
                ));
            }
            if array.shape != info.shape {
                let (want, got) = (format!("of shape {:?}", info.shape), format!("{:?}", array.shape));
                return Err(Error::refuse(ErrorKind::Value, place, label, want, got));
            }
            if array.dtype != info.dtype {
                return Err(Error::refuse(ErrorKind::Type, place, label, info.dtype, array.dtype));
            }
        }
        // What every variant of the rule uses must be there; the rest starts at zero when it is needed.
        let needed = self.preset.rule.kernels().iter().map(|k| k.slots).min().unwrap_or(0);
        if let Some(slot) = declared[..needed].iter().find(|s| !state.slots.contains_key(s.name)) {
            let label = format!("{} of {}", slot.name, info.label(i));
            return Err(Error::refuse(ErrorKind::Value, place, label, "present", "none"));
        }
        if self.preset.declaration().shows_step && state.step == 0 {
            let label = format!("step of {}", info.label(i));
            return Err(Error::refuse(ErrorKind::Value, place, label, "present and >= 1", "none or 0"));
        }
        Ok(declared.iter().map(|s| state.slots.get(s.name)).collect())
    }

    /// Writes checked state. New buffers are allocated first, so that running out of memory changes
    /// nothing; views of old buffers keep what they show.
    fn write_state(&mut self, loaded: &[Option<Loaded<'_>>]) -> Result<()> {
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            let declared = self.preset.declaration().slots.len();
            let mut slots: Vec<Vec<Option<&[u8]>>> = vec![vec![None; declared]; loaded.len()];
            for (slots, (_, arrays)) in slots.iter_mut().zip(loaded).filter_map(|(s, state)| Some((s, state.as_ref()?)))
            {
                *slots = arrays.iter().map(|array| Some(array.as_ref()?.bytes.as_slice())).collect();
            }
            let outcome = executor.replace_slots(&slots);
            self.torn |= matches!(&outcome, Err(e) if e.kind() == ErrorKind::DeviceLost);
            outcome?;
            for (entry, state) in self.entries.iter_mut().zip(loaded) {
                entry.step = state.as_ref().map_or(0, |(step, _)| *step);
            }
            return Ok(());
        }
        let mut fresh = Vec::with_capacity(loaded.len());
        for (entry, state) in self.entries.iter().zip(loaded) {
            let mut slots = vec![None; entry.slots.len()];
            for (slot, array) in slots.iter_mut().zip(state.iter().flat_map(|(_, arrays)| arrays)) {
                if let Some(array) = array {
                    let buffer = Buffer::zeroed(entry.info.len(), entry.info.dtype)?;
                    buffer.copy_from(&array.bytes);
                    *slot = Some(Arc::new(buffer));
                }
            }
            fresh.push((state.as_ref().map_or(0, |(step, _)| *step), slots));
        }
        self.allocations += 1;
        for (entry, (step, slots)) in self.entries.iter_mut().zip(fresh) {
            entry.step = step;
            entry.slots = slots;
        }
        Ok(())
    }
}

/// Whether an array is what was registered.
fn fits(place: &str, label: impl Fn() -> String, info: &ParamInfo, raw: &RawTensor) -> Result<()> {
    if raw.dtype != info.dtype {
        return Err(Error::refuse(ErrorKind::Type, place, label(), info.dtype, raw.dtype));
    }
    if raw.len != info.len() {
        return Err(Error::refuse(ErrorKind::Value, place, label(), format!("of {} elements", info.len()), raw.len));
    }
    Ok(())
}

/// The coefficients of one group at one moment.
fn row(preset: &Preset, hypers: &Hypers, at: Moment, flush_subnormals: bool) -> Row {
    let shared = Shared {
        gradient_scale: 1.0,
        maximize: hypers.flag("maximize"),
        decay: preset.rule.decay(hypers),
        flush_subnormals,
    };
    Row { shared, coefficients: preset.rule.coefficients(hypers, at) }
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
