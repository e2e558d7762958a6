//! The engine's optimizer as Python sees it: arrays in, steps, state out.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use pyo3::{PyTraverseError, PyVisit};
use roptim::tensor::RawTensor;
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, StateDict, TensorMut, TensorRef, Value};

use crate::arrays::{self, Access, Context, Seen, as_array, extent, look, shape_text, share_memory};
use crate::errors::{OrRaise, guarded, raise, refuse};
use crate::files;
use crate::parameter::ParameterBase;
use crate::shared::{Home, Shared};
use crate::values;

/// Steps over fewer elements keep the interpreter lock: giving it up and taking it back costs more than
/// other threads would gain.
const HOLD_LOCK_BELOW: usize = 32 * 1024;

/// A registered parameter.
struct Registered {
    parameter: Option<Py<ParameterBase>>,
    array: Py<PyUntypedArray>,
    seen: Seen,
    label: String,
}

/// A byte range that a step writes, with the parameter it belongs to.
#[derive(Clone, Copy)]
struct Interval {
    low: usize,
    high: usize,
    index: usize,
    is_slot: bool,
}

/// Sorted by `low`; `reach[i]` is the largest `high` up to i.
#[derive(Default, Clone)]
struct Writable {
    intervals: Vec<Interval>,
    reach: Vec<usize>,
}

impl Writable {
    fn new(mut intervals: Vec<Interval>) -> Self {
        intervals.retain(|i| i.low < i.high);
        intervals.sort_unstable_by_key(|i| i.low);
        let mut reach = Vec::with_capacity(intervals.len());
        let mut highest = 0;
        for interval in &intervals {
            highest = highest.max(interval.high);
            reach.push(highest);
        }
        Self { intervals, reach }
    }

    fn insert(&mut self, interval: Interval) {
        if interval.low == interval.high {
            return;
        }
        let at = self.intervals.partition_point(|i| i.low <= interval.low);
        self.intervals.insert(at, interval);
        self.reach.insert(at, 0);
        let mut highest = if at > 0 { self.reach[at - 1] } else { 0 };
        for (reach, interval) in self.reach[at..].iter_mut().zip(&self.intervals[at..]) {
            highest = highest.max(interval.high);
            *reach = highest;
        }
    }

    /// Every interval that meets `low..high`.
    fn meeting(&self, (low, high): (usize, usize)) -> impl Iterator<Item = &Interval> {
        let end = if low < high { self.intervals.partition_point(|i| i.low < high) } else { 0 };
        (0..end)
            .rev()
            .take_while(move |&i| self.reach[i] > low)
            .map(|i| &self.intervals[i])
            .filter(move |i| i.high > low)
    }
}

#[derive(Default)]
struct Table {
    params: Vec<Registered>,
    writable: Writable,
    /// The engine's count of allocations that `writable` knows.
    slots_seen: u64,
    /// An array moved since `writable` was made: it stays so until overlap was checked again.
    moved: bool,
}

/// An optimizer of the engine with its registered parameters.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct Engine {
    shared: Arc<Shared>,
    table: Mutex<Table>,
    on_gpu: bool,
}

impl Engine {
    fn name(&self) -> &'static str {
        self.shared.name
    }

    fn table(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Table>> {
        match self.table.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(raise(py, &self.shared.busy())),
        }
    }

    fn label(index: usize, name: Option<&str>, object: &Bound<'_, PyAny>) -> String {
        let own = object.cast::<ParameterBase>().ok().and_then(|p| p.get().label());
        match name.map(str::to_owned).or(own) {
            Some(name) => format!("parameter {name:?}"),
            None => format!("parameter {index}"),
        }
    }

    /// The map with the ranges of `added` in it; refuses parameters that share memory with each other or
    /// with state.
    fn refuse_overlap(
        &self,
        py: Python<'_>,
        known: &[Registered],
        map: &Writable,
        added: &[Registered],
    ) -> PyResult<Writable> {
        let mut map = map.clone();
        for (i, new) in added.iter().enumerate() {
            let index = known.len() + i;
            let (low, high) = extent(&new.seen.raw);
            for other in map.meeting((low, high)) {
                let old = known.get(other.index).unwrap_or_else(|| &added[other.index - known.len()]);
                if !other.is_slot && !share_memory(new.array.bind(py), old.array.bind(py)) {
                    continue;
                }
                let got = match () {
                    () if other.is_slot => format!("memory of state of {}", old.label),
                    () if new.array.is(&old.array) => format!("the array of {} again", old.label),
                    () => format!("memory of {}", old.label),
                };
                let remedy = Some("give each array once; copy what overlaps");
                return Err(refuse(py, ErrorKind::Value, self.name(), &new.label, "memory of its own", got, remedy));
            }
            map.insert(Interval { low, high, index, is_slot: false });
        }
        Ok(map)
    }

    /// Reads every parameter's header again and looks in full at what changed.
    fn verify(&self, py: Python<'_>, table: &mut Table, place: &str) -> PyResult<()> {
        for registered in &mut table.params {
            let array = match &registered.parameter {
                Some(parameter) => parameter.get().host(py),
                None => registered.array.bind(py).clone(),
            };
            if array.is(&registered.array) && registered.seen.still_holds(&array, Access::Write) {
                continue;
            }
            let context = Context { place, label: &registered.label };
            let seen = look(&array, Access::Write, context)?;
            if seen.shape() != registered.seen.shape() {
                let (want, got) = (shape_text(registered.seen.shape()), shape_text(seen.shape()));
                let allowed = format!("of shape {want} as registered");
                return Err(refuse(py, ErrorKind::Value, place, &registered.label, allowed, got, None));
            }
            if seen.raw.dtype != registered.seen.raw.dtype {
                let allowed = format!("{} as registered", registered.seen.raw.dtype);
                return Err(refuse(py, ErrorKind::Type, place, &registered.label, allowed, seen.raw.dtype, None));
            }
            registered.array = array.unbind();
            registered.seen = seen;
            table.moved = true;
        }
        let allocations = self.shared.try_use().or_raise(py)?.allocations();
        if table.moved {
            self.refuse_overlap(py, &[], &Writable::default(), &table.params)?;
        }
        if table.moved || allocations != table.slots_seen {
            self.map_writable(py, table)?;
            table.slots_seen = allocations;
            table.moved = false;
        }
        Ok(())
    }

    fn map_writable(&self, py: Python<'_>, table: &mut Table) -> PyResult<()> {
        let optimizer = self.shared.try_use().or_raise(py)?;
        let mut intervals = Vec::new();
        for (index, (registered, entry)) in table.params.iter().zip(optimizer.entries()).enumerate() {
            let (low, high) = extent(&registered.seen.raw);
            intervals.push(Interval { low, high, index, is_slot: false });
            for buffer in entry.slots.iter().flatten() {
                let (low, high) = extent(&buffer.raw());
                intervals.push(Interval { low, high, index, is_slot: true });
            }
        }
        table.writable = Writable::new(intervals);
        Ok(())
    }

    fn gradient(
        &self,
        py: Python<'_>,
        table: &Table,
        index: usize,
        object: &Bound<'_, PyAny>,
        place: &str,
    ) -> PyResult<(RawTensor, Py<PyUntypedArray>)> {
        let registered = &table.params[index];
        let glanced = object
            .cast_exact::<PyUntypedArray>()
            .ok()
            .and_then(|array| Some((registered.seen.glance(array)?, array.clone().unbind())));
        let (raw, array) = match glanced {
            Some(found) => found,
            None => {
                let label = format!("gradient of {}", registered.label);
                let context = Context { place, label: &label };
                let array = as_array(object, Access::Read, context)?;
                let (want, got) = (&registered.seen, array.shape());
                if got != want.shape() {
                    let allowed = format!("of shape {}", shape_text(want.shape()));
                    return Err(refuse(py, ErrorKind::Value, place, &label, allowed, shape_text(got), None));
                }
                let seen = look(&array, Access::Read, context);
                let dtype = match &seen {
                    Ok(seen) => Some(seen.raw.dtype.to_string()),
                    Err(_) => arrays::foreign_dtype(&array),
                };
                if let Some(dtype) = dtype.filter(|name| name != want.raw.dtype.name()) {
                    let remedy = match want.raw.dtype {
                        Dtype::F32 => "cast it with .astype(numpy.float32)",
                        Dtype::F64 => "cast it with .astype(numpy.float64)",
                    };
                    return Err(refuse(py, ErrorKind::Type, place, &label, want.raw.dtype, dtype, Some(remedy)));
                }
                (seen?.raw, array.unbind())
            }
        };
        for met in table.writable.meeting(extent(&raw)) {
            let other = &table.params[met.index];
            if met.is_slot || share_memory(array.bind(py), other.array.bind(py)) {
                let what = if met.is_slot { "state of " } else { "" };
                return Err(refuse(
                    py,
                    ErrorKind::Value,
                    place,
                    &format!("gradient of {}", registered.label),
                    "memory of its own",
                    format!("memory of {what}{}", other.label),
                    Some("copy it with .copy()"),
                ));
            }
        }
        Ok((raw, array))
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (name, backend, threads, flush_denormals, allow_software))]
    fn new(
        py: Python<'_>,
        name: &str,
        backend: &str,
        threads: Option<usize>,
        flush_denormals: bool,
        allow_software: bool,
    ) -> PyResult<Self> {
        let options = Options { threads, flush_subnormals: flush_denormals };
        let (optimizer, on_gpu) = match backend.split_once(':').unwrap_or((backend, "")) {
            ("cpu", "") => (Optimizer::cpu(name, &options), false),
            ("gpu", selector) => {
                let request = crate::devices::request(selector, allow_software);
                (py.detach(|| guarded(name, || Optimizer::gpu(name, &options, &request))), true)
            }
            _ => {
                let allowed = "\"cpu\", \"gpu\" or \"gpu:<index or name>\"";
                return Err(refuse(py, ErrorKind::Value, name, "backend", allowed, format!("{backend:?}"), None));
            }
        };
        let optimizer = optimizer.or_raise(py)?;
        let shared = Arc::new(Shared { name: optimizer.preset().name, optimizer: Mutex::new(optimizer) });
        Ok(Self { shared, table: Mutex::new(Table::default()), on_gpu })
    }

    /// Adds a group. Nothing changes if anything is refused.
    fn add_group(
        &self,
        py: Python<'_>,
        hypers: &Bound<'_, PyDict>,
        params: &Bound<'_, PyList>,
        names: Option<Vec<String>>,
    ) -> PyResult<usize> {
        let mut table = self.table(py)?;
        let place = self.name();
        let mut added = Vec::with_capacity(params.len());
        for (i, object) in params.iter().enumerate() {
            let name = names.as_ref().map(|n| n[i].as_str());
            let label = Self::label(table.params.len() + i, name, &object);
            let parameter = object.cast::<ParameterBase>().ok().map(|p| p.clone().unbind());
            let context = Context { place, label: &label };
            let array = match &parameter {
                Some(p) => {
                    p.get().bring_home(py)?;
                    p.get().host(py)
                }
                None => as_array(&object, Access::Write, context)?,
            };
            let seen = look(&array, Access::Write, context)?;
            added.push(Registered { parameter, array: array.unbind(), seen, label });
        }
        let writable = self.refuse_overlap(py, &table.params, &table.writable, &added)?;
        let infos = added.iter().enumerate().map(|(i, r)| ParamInfo {
            name: names.as_ref().map(|n| n[i].clone()),
            shape: r.seen.shape().to_vec(),
            dtype: r.seen.raw.dtype,
            resident: r.parameter.is_some(),
        });
        let changes = values::hypers(hypers, &self.shared.try_use().or_raise(py)?.preset().hypers(), place)?;
        let changes: Vec<(&str, Value)> = changes.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let group = self.shared.try_use().or_raise(py)?.add_group(&changes, infos.collect()).or_raise(py)?;
        if self.on_gpu {
            for (i, parameter) in added.iter().enumerate().filter_map(|(i, r)| Some((i, r.parameter.as_ref()?))) {
                let home = Home { shared: Arc::clone(&self.shared), index: table.params.len() + i };
                parameter.get().set_home(Some(home));
            }
        }
        table.params.extend(added);
        table.writable = writable;
        Ok(group)
    }

    /// Checks hyperparameters as a group's without keeping them.
    fn check_hypers(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<()> {
        let preset = self.shared.try_use().or_raise(py)?.preset();
        let mut hypers = preset.hypers();
        let changes = values::hypers(given, &hypers, self.name())?;
        let changes: Vec<(&str, Value)> = changes.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        preset.set(self.name(), &mut hypers, &changes).or_raise(py)
    }

    /// Checks and sets hyperparameters of a group; on an error the old values stay.
    fn set_hypers(&self, py: Python<'_>, group: usize, changes: &Bound<'_, PyDict>) -> PyResult<()> {
        let mut optimizer = self.shared.try_use().or_raise(py)?;
        let place =
            if optimizer.groups().len() > 1 { format!("{} group {group}", self.name()) } else { self.name().into() };
        let changes = values::hypers(changes, &optimizer.groups()[group], &place)?;
        let changes: Vec<(&str, Value)> = changes.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        optimizer.set_hypers(group, &changes).or_raise(py)
    }

    /// One update. `gradients` in order of registration, None for "no gradient"; without the list each
    /// Parameter's own gradient.
    #[pyo3(signature = (gradients=None))]
    fn step(&self, py: Python<'_>, gradients: Option<&Bound<'_, PyList>>) -> PyResult<()> {
        let place = format!("{}.step", self.name());
        let mut guard = self.table(py)?;
        let table = &mut *guard;
        self.verify(py, table, &place)?;
        // The arrays are kept alive until the step is over.
        let mut keep = Vec::with_capacity(table.params.len());
        let mut tensors: Vec<Option<TensorRef<'_>>> = Vec::with_capacity(table.params.len());
        let mut elements = 0;
        for index in 0..table.params.len() {
            let parameter = table.params[index].parameter.as_ref().map(|p| p.get());
            let object = match (gradients, parameter) {
                (Some(list), p) => {
                    let item = list.get_item(index)?;
                    let wanted = !item.is_none() && p.is_none_or(ParameterBase::wants_gradient);
                    wanted.then_some(item)
                }
                (None, Some(p)) => p.step_gradient(py),
                (None, None) => {
                    let remedy = "call step(gradients), or wrap the arrays in roptim.Parameter and set .grad";
                    return Err(refuse(
                        py,
                        ErrorKind::Type,
                        &place,
                        "gradients",
                        "given for plain arrays",
                        "none",
                        Some(remedy),
                    ));
                }
            };
            let Some(object) = object else {
                tensors.push(None);
                continue;
            };
            let (raw, array) = self.gradient(py, table, index, &object, &place)?;
            elements += raw.len;
            // SAFETY: the gate checked address, alignment and dtype, `gradient` checked overlap with
            // everything the step writes, and `keep` holds the array.
            tensors.push(Some(unsafe { TensorRef::from_raw(raw) }));
            keep.push(array);
        }
        let mut targets: Vec<TensorMut<'_>> = table
            .params
            .iter()
            // SAFETY: `verify` looked at the arrays just now; the table holds them; registration and
            // `verify` refused overlap between them.
            .map(|r| unsafe { TensorMut::from_raw(r.seen.raw.clone()) })
            .collect();
        self.settle_homes(py, table)?;
        let mut run = || guarded(&place, || self.shared.try_use()?.step(&mut targets, &tensors));
        let outcome = if elements < HOLD_LOCK_BELOW && !self.on_gpu { run() } else { py.detach(run) };
        drop(keep);
        outcome.or_raise(py)
    }

    /// Names of the slots a parameter has, `step` first where the optimizer shows it; empty before the
    /// first update.
    fn state_keys(&self, py: Python<'_>, index: usize) -> PyResult<Vec<&'static str>> {
        let optimizer = self.shared.try_use().or_raise(py)?;
        if !optimizer.has_state(index) {
            return Ok(Vec::new());
        }
        let step = optimizer.preset().declaration().shows_step.then_some("step");
        Ok(step.into_iter().chain(optimizer.slot_keys(index)).collect())
    }

    /// Updates applied to a parameter.
    fn step_of(&self, py: Python<'_>, index: usize) -> PyResult<u64> {
        Ok(self.shared.try_use().or_raise(py)?.entries()[index].step)
    }

    /// Sets a parameter's count of updates.
    fn set_step_of(&self, py: Python<'_>, index: usize, step: u64) -> PyResult<()> {
        self.shared.try_use().or_raise(py)?.set_step(index, step);
        Ok(())
    }

    /// One slot: a view on the CPU, a read-only copy on a GPU; None where it does not exist.
    fn slot<'py>(&self, py: Python<'py>, index: usize, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (buffer, copy, shape) = {
            let optimizer = self.shared.try_use().or_raise(py)?;
            let buffer = optimizer.slot(index, key);
            let copy =
                if buffer.is_none() && self.on_gpu { optimizer.slot_array(index, key).or_raise(py)? } else { None };
            (buffer, copy, optimizer.entries()[index].info.shape.clone())
        };
        if let Some(buffer) = buffer {
            return arrays::view(py, &buffer, &shape).map(Some);
        }
        let Some(copy) = copy else { return Ok(None) };
        let array = arrays::from_bytes(py, copy.dtype.name(), &copy.shape, &copy.bytes)?;
        array.call_method1("setflags", (false,))?;
        Ok(Some(array))
    }

    /// Returns a parameter to step 0 without state.
    fn reset(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        self.shared.try_use().or_raise(py)?.reset(index).or_raise(py)
    }

    /// Hyperparameters of a group, as the engine holds them.
    fn hypers<'py>(&self, py: Python<'py>, group: usize) -> PyResult<Bound<'py, PyDict>> {
        let optimizer = self.shared.try_use().or_raise(py)?;
        values::to_dict(py, optimizer.groups()[group].iter())
    }

    /// A copy of everything but the parameters' values, in torch's layout.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let tree = py.detach(|| {
            guarded(self.name(), || {
                let optimizer = self.shared.try_use()?;
                let shows_step = optimizer.preset().declaration().shows_step;
                Ok(optimizer.state_dict()?.into_tree(shows_step))
            })
        });
        files::from_tree(py, &tree.or_raise(py)?)
    }

    /// Replaces hyperparameters and state by those of a dict in torch's layout, checked as a whole before
    /// anything is written.
    fn load_state_dict(&self, py: Python<'_>, saved: &Bound<'_, PyDict>) -> PyResult<()> {
        let place = format!("{}.load_state_dict", self.name());
        let tree = files::to_tree(saved, &place, "state_dict", 0)?;
        let load = || {
            let mut optimizer = self.shared.try_use()?;
            let declared = optimizer.preset().declaration().hypers;
            optimizer.load_state_dict(&StateDict::from_tree(tree, Some(declared))?)
        };
        py.detach(|| guarded(&place, load)).or_raise(py)
    }

    /// Applied updates.
    #[getter]
    fn update_count(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.shared.try_use().or_raise(py)?.update_count())
    }

    /// Whether an interrupted step left work half done.
    #[getter]
    fn torn(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.shared.try_use().or_raise(py)?.is_torn())
    }

    /// What the steps run on.
    #[getter]
    fn device(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.shared.try_use().or_raise(py)?.device_name())
    }

    /// For tests: a weaker instruction set and another chunk. The bits do not change.
    fn _force_cpu(&self, py: Python<'_>, isa: &str, chunk: usize) -> PyResult<()> {
        let level = roptim::cpu::Isa::ALL.into_iter().find(|level| level.name() == isa);
        let level = level.unwrap_or(roptim::cpu::Isa::Baseline);
        self.shared.try_use().or_raise(py)?.force_cpu(level, chunk);
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(table) = self.table.try_lock() {
            for registered in &table.params {
                visit.call(&registered.array)?;
                if let Some(parameter) = &registered.parameter {
                    visit.call(parameter)?;
                }
            }
        }
        Ok(())
    }
}

impl Engine {
    /// A Parameter's truth follows the optimizer that steps it: what another one's device holds is
    /// brought to the host first.
    fn settle_homes(&self, py: Python<'_>, table: &Table) -> PyResult<()> {
        for (index, registered) in table.params.iter().enumerate() {
            let Some(parameter) = registered.parameter.as_ref().map(|p| p.get()) else { continue };
            let home = parameter.home();
            let settled = match &home {
                Some(home) => self.on_gpu && home.index == index && Arc::ptr_eq(&home.shared, &self.shared),
                None => !self.on_gpu,
            };
            if settled {
                continue;
            }
            parameter.bring_home(py)?;
            self.shared.host_written(index);
            let here = || Home { shared: Arc::clone(&self.shared), index };
            parameter.set_home(self.on_gpu.then(here));
        }
        Ok(())
    }
}
