//! The engine's optimizer as Python sees it: arrays in, steps, state out.

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyFloat, PyList};
use pyo3::{PyTraverseError, PyVisit};
use roptim::closure::Ask;
use roptim::error::shape_text;
use roptim::room::recycled;
use roptim::rules::Method;
use roptim::store::Entry;
use roptim::tensor::RawTensor;
use roptim::{
    Besides, Dtype, ErrorKind, Guard, Nonfinite, Optimizer, Options, ParamInfo, StateDict, TensorMut, TensorRef, Value,
};

use crate::arrays::{self, Access, Context, Seen, Taking, as_array, look, share_memory};
use crate::device_array::DeviceArray;
use crate::errors::{OrRaise, guarded, raise, refuse};
use crate::files;
use crate::forks::{enter, heed, let_pass};
use crate::load::{self, Loading};
use crate::overlap::{Interval, Map};
use crate::parameter::ParameterBase;
use crate::shared::{Haste, Home, Shared};
use crate::sparse::{self, Gradient};
use crate::values;

/// Work from which on a step gives up the interpreter lock, in elements of a float32 array in order: an elementwise rule
/// takes a tenth of a millisecond or two then, a tensor rule more. Who gives it up beside a thread that computes in
/// Python gets it back after milliseconds (`benches/lock.py`); nobody misses it for less.
fn release_lock_from(method: Method) -> usize {
    match method {
        Method::Elementwise(_) => 256 * 1024,
        Method::Tensor(_) | Method::Closure(_) => 32 * 1024,
    }
}

/// A gradient as it was given.
enum Given<'py> {
    Host(Gradient<'py>),
    Device(Bound<'py, DeviceArray>),
}

/// As large as a gradient as it was given: what keeps memory for a list of them, which holds none between steps.
type Place = [usize; size_of::<Option<Given<'static>>>() / size_of::<usize>()];

/// What gradients of a parameter may store.
fn gradient_dtypes(parameter: Dtype) -> String {
    match parameter.of_state() {
        own if own == parameter => own.to_string(),
        wide => format!("{parameter} or {wide}"),
    }
}

/// A registered parameter.
struct Registered {
    parameter: Option<Py<ParameterBase>>,
    /// The object of another library that has the memory, which may move it between steps.
    owner: Option<Py<PyAny>>,
    array: Py<PyUntypedArray>,
    seen: Seen,
    label: String,
    /// Address of a gradient in C order that was found to share no memory with what steps write, and the table's epoch
    /// then.
    clear_of: (usize, u64),
}

impl Registered {
    /// The work of a step, in elements of a float32 array in order; roughly, as measured. A sparse gradient may touch
    /// all of its parameter, in momentum.
    fn work(&self, gradient: &RawTensor, is_sparse: bool) -> usize {
        const BY_BLOCKS: usize = 16;
        let own = &self.seen.raw;
        let is_narrow = |raw: &RawTensor| matches!(raw.dtype, Dtype::F16 | Dtype::BF16);
        let is_gathered = [own, gradient].into_iter().any(|raw| raw.strides.is_some() || is_narrow(raw)) || is_sparse;
        let weight = match (is_gathered, own.dtype) {
            (false, Dtype::F64) => 3,
            (false, _) => 1,
            (true, Dtype::F64) => 2 * BY_BLOCKS,
            (true, _) => BY_BLOCKS,
        };
        own.len.saturating_mul(weight)
    }

    /// What an object of another library has as its gradient; `None` without such an object, or one that has no
    /// gradients.
    fn own_gradient<'py>(&self, py: Python<'py>) -> PyResult<Option<Option<Bound<'py, PyAny>>>> {
        let Some(owner) = &self.owner else { return Ok(None) };
        let gradient = owner.bind(py).getattr_opt("grad")?;
        Ok(gradient.map(|gradient| (!gradient.is_none()).then_some(gradient)))
    }

    /// Address of a gradient that looks like the parameter and lies where one was found to be clear of what steps write.
    #[inline]
    fn recognized(&self, Gradient { array, touched }: &Gradient<'_>, access: Access, epoch: u64) -> Option<*mut u8> {
        let address = self.seen.glance(array, access).filter(|_| touched.is_none())?;
        ((address as usize, epoch) == self.clear_of).then_some(address)
    }
}

/// An average that joins parameters in their step.
struct Lent<'e> {
    engine: &'e Engine,
    table: MutexGuard<'e, Table>,
}

/// The engine of such an average, and its averages.
type Joined<'e> = (&'e Shared, Vec<TensorMut<'static>>);

impl<'e> Lent<'e> {
    /// An average of the parameters of `engine`.
    fn from(py: Python<'_>, average: &'e Engine, engine: &Engine, place: &str) -> PyResult<Self> {
        if !average.is_average || average.on_gpu || engine.on_gpu {
            let (allowed, got) = ("an AveragedModel on the CPU, as is the optimizer", average.name());
            return Err(refuse(py, ErrorKind::Type, place, "average", allowed, got, None));
        }
        Ok(Self { engine: average, table: average.table(py)? })
    }

    /// The averages, verified: as many as there are parameters, of their shapes, in memory that is neither theirs nor
    /// that of gradients.
    fn joined(
        &mut self,
        py: Python<'_>,
        of: &Table,
        gradients: &[Option<TensorRef<'_>>],
        place: &str,
    ) -> PyResult<Joined<'e>> {
        let refuse =
            |name: &str, allowed: &str, got: String| Err(refuse(py, ErrorKind::Value, place, name, allowed, got, None));
        self.engine.verify(py, &mut self.table, place, Haste::Now)?;
        let averages = &self.table.params;
        if averages.len() != of.params.len() {
            return refuse("average", &format!("of {} parameters", of.params.len()), averages.len().to_string());
        }
        for (p, average) in of.params.iter().zip(averages) {
            let form = |seen: &Seen| format!("{} of shape {}", seen.dtype, shape_text(seen.shape()));
            if (p.seen.shape(), p.seen.dtype) != (average.seen.shape(), average.seen.dtype) {
                return refuse(&format!("average of {}", p.label), &form(&p.seen), form(&average.seen));
            }
        }
        let given = gradients.iter().zip(&of.params).filter_map(|(g, p)| Some((g.as_ref()?.raw(), "gradient of ", p)));
        for (raw, what, p) in of.params.iter().map(|p| (&p.seen.raw, "", p)).chain(given) {
            // Averages are copies without gaps: who lies between their first and last byte shares memory with them.
            if self.table.writable.meeting(raw).next().is_some() {
                return refuse(&format!("{what}{}", p.label), "memory of its own", "memory of the average".into());
            }
        }
        // SAFETY: `verify` looked at the arrays just now, and at overlap between them; the table, which is locked,
        // holds them. With what else the step reads and writes they share no memory.
        let tensors = averages.iter().map(|r| unsafe { TensorMut::from_raw(r.seen.raw.clone()) }).collect();
        Ok((&self.engine.shared, tensors))
    }
}

#[derive(Default)]
struct Table {
    params: Vec<Registered>,
    /// Whether one of them has an owner.
    has_owners: bool,
    writable: Map,
    /// The engine's count of allocations that `writable` knows.
    slots_seen: u64,
    /// An array moved since `writable` was made; stays so until overlap was checked again.
    moved: bool,
    /// How often `writable` was made.
    epoch: u64,
    /// The parameters, in the epoch that they were made in.
    targets: (u64, Vec<TensorMut<'static>>),
    /// Gradients of the last step, whose addresses nobody uses until they were brought up to date.
    gradients: Vec<Option<TensorRef<'static>>>,
    /// Memory for the arrays of a step's gradients.
    places: Vec<Place>,
}

/// An optimizer of the engine with its registered parameters.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct Engine {
    shared: Arc<Shared>,
    /// Where errors of a step are placed.
    step: String,
    /// Work from which on a step gives up the interpreter lock.
    release_lock_from: usize,
    table: Arc<Mutex<Table>>,
    on_gpu: bool,
    needs_closure: bool,
    /// Whether its parameters are averages, which whatever joins them changes, also where they are frozen.
    is_average: bool,
}

impl Engine {
    /// Whether a Parameter's truth is on the device. A closure reads its parameters between evaluations, so those
    /// of an optimizer that takes one stay with the host.
    fn houses_parameters(&self) -> bool {
        self.on_gpu && !self.needs_closure
    }

    fn name(&self) -> &'static str {
        self.shared.name
    }

    fn table(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Table>> {
        let_pass(py);
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
    /// with state. `known` are the parameters the map has already.
    fn refuse_overlap(&self, py: Python<'_>, known: &[Registered], map: Map, added: &[Registered]) -> PyResult<Map> {
        let ranges = added.iter().enumerate();
        let map = map.with(ranges.map(|(i, new)| Interval::of(&new.seen.raw, known.len() + i, false)));
        for (i, new) in added.iter().enumerate() {
            let index = known.len() + i;
            // Those after it will meet it themselves.
            for other in map.meeting(&new.seen.raw).filter(|other| other.is_slot || other.index < index) {
                // State of a parameter that is only now being added has its index, too.
                let old = known.get(other.index).unwrap_or_else(|| &added[other.index - known.len()]);
                let array_of = |r: &'_ Registered| r.array.bind(py).clone();
                if !other.is_slot && !share_memory((&array_of(new), &new.seen.raw), (&array_of(old), &old.seen.raw)) {
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
        }
        Ok(map)
    }

    /// Brings the map of written memory up to date with the engine's slots and with arrays that moved.
    fn refresh(&self, py: Python<'_>, table: &mut Table, haste: Haste) -> PyResult<()> {
        let (allocations, slots) = {
            let optimizer = self.shared.in_haste(haste).or_raise(py)?;
            let allocations = optimizer.allocations();
            if allocations == table.slots_seen && !table.moved {
                return Ok(());
            }
            let entries = optimizer.entries().iter().enumerate();
            let of_entry = |(index, entry): (usize, &Entry)| {
                let buffers = entry.slots.iter().flatten().map(|b| Interval::of(&b.raw(), index, true));
                buffers.collect::<Vec<_>>()
            };
            (allocations, entries.flat_map(of_entry).collect())
        };
        table.writable = self.refuse_overlap(py, &[], Map::new(slots), &table.params)?;
        table.slots_seen = allocations;
        table.moved = false;
        table.epoch += 1;
        Ok(())
    }

    /// Reads every parameter's header again and looks in full at what changed.
    fn verify(&self, py: Python<'_>, table: &mut Table, place: &str, haste: Haste) -> PyResult<()> {
        for registered in &mut table.params {
            let (array, access) = match registered.parameter.as_ref().map(|p| p.get()) {
                None if registered.seen.still_holds(registered.array.bind(py), Access::Write) => continue,
                None => (registered.array.bind(py).clone(), Access::Write),
                Some(parameter) => {
                    // What lies on a device is written by the engine alone.
                    let access = if parameter.is_away() { Access::Read } else { Access::Write };
                    let array = parameter.host(py);
                    if array.is(&registered.array) && registered.seen.still_holds(&array, access) {
                        continue;
                    }
                    (array, access)
                }
            };
            let context = Context { place, label: &registered.label };
            let seen = look(&array, access, context)?;
            if seen.shape() != registered.seen.shape() {
                let (want, got) = (shape_text(registered.seen.shape()), shape_text(seen.shape()));
                let allowed = format!("of shape {want} as registered");
                return Err(refuse(py, ErrorKind::Value, place, &registered.label, allowed, got, None));
            }
            if seen.dtype != registered.seen.dtype {
                let allowed = format!("{} as registered", registered.seen.dtype);
                return Err(refuse(py, ErrorKind::Type, place, &registered.label, allowed, seen.dtype, None));
            }
            registered.array = array.unbind();
            registered.seen = seen;
            table.moved = true;
        }
        self.refresh(py, table, haste)
    }

    /// Looks anew where objects of other libraries have their memory, and tells them whose is `written` to.
    fn renew_views(
        &self,
        py: Python<'_>,
        table: &mut Table,
        place: &str,
        written: impl Fn(usize) -> bool,
    ) -> PyResult<()> {
        if !table.has_owners {
            return Ok(());
        }
        let owners = PyList::empty(py);
        for (index, registered) in table.params.iter_mut().enumerate() {
            let Some(owner) = &registered.owner else { continue };
            let context = Context { place, label: &registered.label };
            registered.array = as_array(owner.bind(py), Access::Write, context)?.unbind();
            if written(index) {
                owners.append(owner)?;
            }
        }
        py.import("roptim._foreign")?.call_method1("will_write", (owners,)).map(drop)
    }

    /// Adds the gradients as arrays, in order of registration. Python code of the objects may run here, so
    /// that nothing that was looked at before still counts.
    fn collect<'py>(
        &self,
        py: Python<'py>,
        table: &Table,
        gradients: Option<&Bound<'py, PyList>>,
        access: Access,
        place: &str,
        collected: &mut Vec<Option<Given<'py>>>,
    ) -> PyResult<()> {
        let count = table.params.len();
        if let Some(list) = gradients
            && list.len() != count
        {
            let (want, got) = (format!("{count} in number"), list.len());
            return Err(refuse(py, ErrorKind::Value, place, "gradients", want, got, None));
        }
        collected.reserve(count);
        for (index, registered) in table.params.iter().enumerate() {
            let parameter = registered.parameter.as_ref().map(|p| p.get());
            let object = match (gradients, parameter) {
                (Some(list), p) => {
                    // Converting one before it may have run code that took some out.
                    let item = list.get_item(index).map_err(|_| {
                        let want = format!("{count} in number");
                        refuse(py, ErrorKind::Value, place, "gradients", want, list.len(), None)
                    })?;
                    let wanted = !item.is_none() && (self.is_average || p.is_none_or(ParameterBase::wants_gradient));
                    wanted.then_some(item)
                }
                (None, Some(p)) => p.step_gradient(py),
                (None, None) => match registered.own_gradient(py)? {
                    Some(gradient) => gradient,
                    None => return Err(self.no_gradients(py, place)),
                },
            };
            collected.push(match object {
                None => None,
                Some(object) => match object.cast_into_exact::<PyUntypedArray>() {
                    Ok(array) => Some(Given::Host(Gradient { array, touched: None })),
                    Err(other) => Some(self.converted(&other.into_inner(), registered, access, place)?),
                },
            });
        }
        Ok(())
    }

    fn no_gradients(&self, py: Python<'_>, place: &str) -> PyErr {
        let remedy = Some(if self.needs_closure {
            "return (loss, gradients) from the closure, or wrap the arrays in roptim.Parameter and set .grad"
        } else {
            "call step(gradients), or wrap the arrays in roptim.Parameter and set .grad"
        });
        refuse(py, ErrorKind::Type, place, "gradients", "given for plain arrays", "none", remedy)
    }

    /// A gradient that is no plain array.
    fn converted<'py>(
        &self,
        object: &Bound<'py, PyAny>,
        registered: &Registered,
        access: Access,
        place: &str,
    ) -> PyResult<Given<'py>> {
        let home;
        let object = match object.cast::<DeviceArray>() {
            Ok(array) if self.on_gpu && !self.needs_closure => return Ok(Given::Device(array.clone())),
            Ok(_) if access == Access::Write => {
                let (py, label) = (object.py(), format!("gradient of {}", registered.label));
                let remedy = Some("clear it after the step");
                return Err(refuse(py, ErrorKind::Type, place, &label, "an array", "one on a device", remedy));
            }
            Ok(array) => {
                home = array.get().home(object.py())?;
                &home
            }
            Err(_) => object,
        };
        let label = format!("gradient of {}", registered.label);
        let context = Context { place, label: &label };
        if let Some(sparse) = sparse::of_rows(object, registered.seen.shape(), context)? {
            return Ok(Given::Host(sparse));
        }
        let array = as_array(object, access, context)?;
        Ok(Given::Host(Gradient { array, touched: None }))
    }

    /// Looks at a gradient: shape and dtype of its parameter, and memory that the step does not write.
    fn look_at_gradient(
        &self,
        py: Python<'_>,
        table: &mut Table,
        index: usize,
        Gradient { array, touched }: &Gradient<'_>,
        access: Access,
        place: &str,
    ) -> PyResult<RawTensor> {
        let Registered { seen: want, label: parameter, .. } = &table.params[index];
        let label = || format!("gradient of {parameter}");
        let glance = want.glance(array, access).filter(|_| touched.is_none());
        let mark = glance.map(|address| (address as usize, table.epoch));
        let raw = match glance {
            Some(ptr) => RawTensor { ptr, strides: None, ..want.raw },
            None => {
                let label = label();
                let context = Context { place, label: &label };
                let got = array.shape();
                // The shape of a sparse gradient was compared when its rows were read.
                if got != want.shape() && touched.is_none() {
                    let allowed = format!("of shape {}", shape_text(want.shape()));
                    return Err(refuse(py, ErrorKind::Value, place, &label, allowed, shape_text(got), None));
                }
                let seen = look(array, access, context);
                let wrong = match &seen {
                    Ok(seen) => (!want.dtype.takes(seen.dtype)).then(|| seen.dtype.to_string()),
                    Err(_) => arrays::foreign_dtype(array),
                };
                if let Some(dtype) = wrong {
                    let allowed = gradient_dtypes(want.dtype);
                    let remedy = match want.dtype.of_state() {
                        Dtype::F64 => "cast it with .astype(numpy.float64)",
                        Dtype::C64 => "cast it with .astype(numpy.complex64)",
                        Dtype::C128 => "cast it with .astype(numpy.complex128)",
                        _ => "cast it with .astype(numpy.float32)",
                    };
                    return Err(refuse(py, ErrorKind::Type, place, &label, allowed, dtype, Some(remedy)));
                }
                seen?.raw
            }
        };
        for met in table.writable.meeting(&raw) {
            let other = &table.params[met.index];
            if met.is_slot || share_memory((array, &raw), (other.array.bind(py), &other.seen.raw)) {
                let what = if met.is_slot { "state of " } else { "" };
                let got = format!("memory of {what}{}", other.label);
                let remedy = Some("copy it with .copy()");
                return Err(refuse(py, ErrorKind::Value, place, &label(), "memory of its own", got, remedy));
            }
        }
        if let Some(mark) = mark {
            table.params[index].clear_of = mark;
        }
        Ok(raw)
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "the options of an optimizer, given by name")]
    #[pyo3(signature = (
        name, *, backend, threads, flush_denormals, allow_software, clip_norm, clip_value, nonfinite, nonfinite_sync
    ))]
    fn new(
        py: Python<'_>,
        name: &str,
        backend: &str,
        threads: Option<usize>,
        flush_denormals: bool,
        allow_software: bool,
        clip_norm: Option<f64>,
        clip_value: Option<f64>,
        nonfinite: &str,
        nonfinite_sync: bool,
    ) -> PyResult<Self> {
        let nonfinite = match nonfinite {
            "propagate" => Nonfinite::Propagate,
            "raise" => Nonfinite::Raise,
            "skip" => Nonfinite::Skip,
            other => {
                let allowed = "\"propagate\", \"raise\" or \"skip\"";
                return Err(refuse(py, ErrorKind::Value, name, "nonfinite", allowed, format!("{other:?}"), None));
            }
        };
        let guard = Guard { clip_norm, clip_value, nonfinite };
        let options = Options { threads, flush_subnormals: flush_denormals, guard, nonfinite_sync };
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
        let preset = optimizer.preset();
        let shared = Arc::new(Shared::new(optimizer));
        let step = format!("{}.step", preset.name);
        let release_lock_from = release_lock_from(preset.method);
        let table = Arc::new(Mutex::new(Table::default()));
        heed(Arc::downgrade(&table) as _);
        heed(Arc::downgrade(&shared) as _);
        Ok(Self {
            shared,
            step,
            release_lock_from,
            table,
            on_gpu,
            needs_closure: preset.needs_closure(),
            is_average: preset.name == "AveragedModel",
        })
    }

    /// Adds a group and returns its hyperparameters. Nothing changes if anything is refused. The memory on a device
    /// is made at once, or, without `reserve`, by [`Engine::reserve`].
    #[pyo3(signature = (hypers, params, names, reserve=true))]
    fn add_group<'py>(
        &self,
        py: Python<'py>,
        hypers: &Bound<'_, PyDict>,
        params: &Bound<'_, PyList>,
        names: Option<Vec<String>>,
        reserve: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let mut guard = self.table(py)?;
        let table = &mut *guard;
        let place = self.name();
        let defaults = self.shared.try_use().or_raise(py)?.preset().hypers();
        let changes = values::hypers(hypers, &defaults, place)?;
        let objects: Vec<_> = params.iter().collect();
        let mut arrays = Vec::with_capacity(objects.len());
        for (i, object) in objects.iter().enumerate() {
            let label = Self::label(table.params.len() + i, names.as_ref().map(|n| n[i].as_str()), object);
            let parameter = object.cast::<ParameterBase>().ok().map(|p| p.clone().unbind());
            let array = match &parameter {
                Some(p) => {
                    p.get().bring_home(py)?;
                    p.get().host(py)
                }
                None => as_array(object, Access::Write, Context { place, label: &label })?,
            };
            arrays.push((label, parameter, array));
        }
        let mut alone = Vec::with_capacity(arrays.len());
        let added = arrays
            .into_iter()
            .zip(&objects)
            .map(|((label, parameter, array), object)| {
                let away = parameter.as_ref().is_some_and(|p| p.get().is_away());
                let access = if away { Access::Read } else { Access::Write };
                let seen = look(&array, access, Context { place, label: &label })?;
                alone.push(parameter.as_ref().is_some_and(|p| p.get().is_alone(py, 1)));
                let owner = (parameter.is_none() && !array.is(object)).then(|| object.clone().unbind());
                Ok(Registered { parameter, owner, array: array.unbind(), seen, label, clear_of: (0, 0) })
            })
            .collect::<PyResult<Vec<_>>>()?;
        self.refresh(py, table, Haste::Now)?;
        let writable = self.refuse_overlap(py, &table.params, table.writable.clone(), &added)?;
        let infos = added.iter().enumerate().map(|(i, r)| ParamInfo {
            name: names.as_ref().map(|n| n[i].clone()),
            shape: r.seen.shape().to_vec(),
            dtype: r.seen.dtype,
            resident: r.parameter.is_some() && !self.needs_closure,
        });
        let infos = infos.collect();
        let changes: Vec<(&str, Value)> = changes.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let hypers = guarded(place, || {
            let mut optimizer = self.shared.try_use()?;
            let add = if reserve { Optimizer::add_group } else { Optimizer::add_group_without_memory };
            let group = add(&mut optimizer, &changes, infos)?;
            for (i, registered) in added.iter().enumerate() {
                optimizer.set_title(table.params.len() + i, &registered.label);
            }
            Ok(optimizer.groups()[group].clone())
        });
        let hypers = hypers.or_raise(py)?;
        let first = table.params.len();
        table.has_owners |= added.iter().any(|registered| registered.owner.is_some());
        table.params.extend(added);
        table.writable = writable;
        table.epoch += 1;
        // The engine has the group now. Where memory for a copy of a parameter is missing, the next step tries again.
        for ((i, registered), alone) in table.params[first..].iter().enumerate().zip(alone) {
            let Some(parameter) = &registered.parameter else { continue };
            let here = || Home { shared: Arc::clone(&self.shared), index: first + i };
            let parameter = parameter.get();
            while !parameter.move_home(py, parameter.home().as_ref(), self.houses_parameters().then(here), alone)? {}
        }
        values::to_dict(py, hypers.iter())
    }

    /// Makes the memory that steps need on a device.
    fn reserve(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| guarded(self.name(), || self.shared.try_use()?.reserve())).or_raise(py)
    }

    /// Lets go of Parameters that are at home here: those of an optimizer that is not to be.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        let parameters: Vec<_> = {
            let table = self.table(py)?;
            table.params.iter().filter_map(|r| r.parameter.as_ref().map(|p| p.clone_ref(py))).collect()
        };
        for parameter in parameters.iter().map(|parameter| parameter.get()) {
            if let Some(home) = parameter.home().filter(|home| Arc::ptr_eq(&home.shared, &self.shared)) {
                parameter.move_home(py, Some(&home), None, false)?;
            }
        }
        Ok(())
    }

    /// Takes over what a state dict does not hold.
    fn take_over(&self, py: Python<'_>, other: &Bound<'_, Self>) -> PyResult<()> {
        let (norm, scale) = (other.get().gradient_norm(py)?, other.get().grad_scale(py)?);
        let mut optimizer = self.shared.try_use().or_raise(py)?;
        optimizer.set_gradient_norm(norm);
        optimizer.set_grad_scale(scale).or_raise(py)
    }

    /// Checks hyperparameters as a group's without keeping them.
    fn check_hypers(&self, py: Python<'_>, given: &Bound<'_, PyDict>) -> PyResult<()> {
        let preset = self.shared.try_use().or_raise(py)?.preset();
        let mut hypers = preset.hypers();
        let changes = values::hypers(given, &hypers, self.name())?;
        let changes: Vec<(&str, Value)> = changes.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        preset.set(self.name(), &mut hypers, &changes).or_raise(py)
    }

    /// Checks and sets hyperparameters of a group and returns all of them; on an error the old values stay.
    fn set_hypers<'py>(
        &self,
        py: Python<'py>,
        group: usize,
        changes: &Bound<'_, PyDict>,
    ) -> PyResult<Bound<'py, PyDict>> {
        // Reading the values may run Python code, so the engine is not locked meanwhile.
        let (hypers, several) = {
            let optimizer = self.shared.try_use().or_raise(py)?;
            (optimizer.groups()[group].clone(), optimizer.groups().len() > 1)
        };
        let place = if several { format!("{} group {group}", self.name()) } else { self.name().into() };
        let changes = values::hypers(changes, &hypers, &place)?;
        let changes: Vec<(&str, Value)> = changes.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let set = self.shared.try_use().and_then(|mut optimizer| {
            optimizer.set_hypers(group, &changes)?;
            Ok(optimizer.groups()[group].clone())
        });
        values::to_dict(py, set.or_raise(py)?.iter())
    }

    /// One update. `gradients` in order of registration, None for "no gradient"; without the list each
    /// Parameter's own gradient. With `clear` they are set to zero then, an `average` joins the parameters, and with
    /// `measures` sums of squares are taken, all in the pass of the update where the optimizer allows it.
    #[pyo3(signature = (gradients=None, clear=false, average=None, measures=false))]
    fn step(
        &self,
        py: Python<'_>,
        gradients: Option<&Bound<'_, PyList>>,
        clear: bool,
        average: Option<PyRef<'_, Self>>,
        measures: bool,
    ) -> PyResult<()> {
        let mut lent = average.as_deref().map(|average| Lent::from(py, average, self, &self.step)).transpose()?;
        let lent = lent.as_mut();
        if gradients.is_none() && self.shared.try_use().or_raise(py)?.has_sums() {
            return self.with_parameters_and(py, Haste::Now, lent, |optimizer, besides, params| {
                optimizer.step_accumulated(params, Besides { measures, ..besides })
            });
        }
        let access = if clear { Access::Write } else { Access::Read };
        self.with_gradients(
            py,
            &self.step,
            gradients,
            access,
            Haste::Now,
            lent,
            |optimizer, besides, params, gradients| {
                let besides = Besides { measures, ..besides };
                if clear {
                    // SAFETY: they were looked at as what is written, and for memory in common.
                    unsafe { optimizer.step_and_clear_raw(params, gradients, besides) }
                } else {
                    optimizer.step_with(params, gradients, besides)
                }
            },
        )
    }

    /// By parameter, of the last step where it was asked for them: squares of gradient, update and parameter, summed.
    fn squares(&self, py: Python<'_>) -> PyResult<Vec<Option<(f64, f64, f64)>>> {
        let optimizer = self.shared.try_use().or_raise(py)?;
        let squares = optimizer.squares().iter();
        Ok(squares.map(|squares| squares.map(|s| (s.gradient, s.update, s.parameter))).collect())
    }

    /// Adds gradients to sums on the device, which the next step without gradients takes.
    fn accumulate(&self, py: Python<'_>, gradients: &Bound<'_, PyList>) -> PyResult<()> {
        let add = |optimizer: &mut Optimizer,
                   _: Besides<'_, '_>,
                   _: &mut [TensorMut<'_>],
                   gradients: &[Option<TensorRef<'_>>]| { optimizer.accumulate(gradients) };
        let place = format!("{}.accumulate", self.name());
        self.with_gradients(py, &place, Some(gradients), Access::Read, Haste::Now, None, add)
    }

    /// Forgets such sums.
    fn clear_sums(&self, py: Python<'_>) -> PyResult<()> {
        self.shared.try_use().map(|mut optimizer| optimizer.clear_sums()).or_raise(py)
    }

    /// Waits for the device and brings every Parameter's values to its array.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        if !self.on_gpu {
            return Ok(());
        }
        let place = format!("{}.sync", self.name());
        let guard = self.table(py)?;
        let mut arrays = Vec::new();
        for (index, registered) in guard.params.iter().enumerate() {
            let Some(parameter) = registered.parameter.as_ref().map(|p| p.get()) else { continue };
            if parameter.home().is_some_and(|home| home.is_of(&self.shared, index)) {
                let array = parameter.host(py);
                let seen = look(&array, Access::Read, Context { place: &place, label: &registered.label })?;
                arrays.push((index, array.unbind(), seen));
            }
        }
        // SAFETY: looked at just now; `arrays` holds them until the values have arrived.
        let mut targets: Vec<(usize, TensorMut<'_>)> =
            arrays.iter().map(|(i, _, seen)| (*i, unsafe { TensorMut::from_raw(seen.raw.clone()) })).collect();
        let sync = || {
            guarded(&place, || {
                let mut parts: Vec<_> = targets.iter_mut().map(|(index, target)| (*index, target)).collect();
                self.shared.try_use()?.sync(&mut parts)
            })
        };
        py.detach(sync).or_raise(py)
    }

    /// Loses the device, for tests.
    fn _lose_device(&self, py: Python<'_>) -> PyResult<()> {
        self.shared.try_use().map(|optimizer| optimizer.force_loss()).or_raise(py)
    }

    /// Whether gradients were accumulated for the next step.
    #[getter]
    fn has_sums(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.shared.try_use().or_raise(py)?.has_sums())
    }

    /// Dispatches of the last step on a device.
    #[getter]
    fn dispatches(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.shared.try_use().or_raise(py)?.dispatches())
    }

    /// Bytes that parameters, gradients and state take on a device.
    #[getter]
    fn device_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.shared.try_use().or_raise(py)?.device_bytes())
    }

    /// One step of an optimizer that evaluates the loss several times. `evaluate` is called without arguments
    /// and returns the loss and the gradients, as [`Engine::step`] takes them, at the values that the parameters
    /// have then. An error there, or one of what it returned, leaves parameters and state as they were.
    fn minimize(&self, py: Python<'_>, evaluate: &Bound<'_, PyAny>) -> PyResult<()> {
        self.with_parameters(py, Haste::Now, Optimizer::begin)?;
        *self.shared.minimizing() = Some(std::thread::current().id());
        // The closure may do anything, so nothing is locked while it runs. No Python code runs between the calls,
        // so an interrupt arrives in it and is an error like others.
        let one = || {
            let (loss, gradients): (f64, Option<Bound<'_, PyList>>) = evaluate.call0()?.extract()?;
            self.with_gradients(
                py,
                &self.step,
                gradients.as_ref(),
                Access::Read,
                Haste::Wait,
                None,
                |optimizer, _, params, gradients| optimizer.tell(loss, params, gradients),
            )
        };
        let outcome = loop {
            match one() {
                Ok(Ask::Evaluate) => {}
                Ok(Ask::Done) => break Ok(()),
                Err(error) => break self.abandon(py, &error).and(Err(error)),
            }
        };
        *self.shared.minimizing() = None;
        outcome
    }

    /// Names of the slots a parameter has, `step` first where the optimizer shows it; empty before the
    /// first update.
    fn state_keys(&self, py: Python<'_>, index: usize) -> PyResult<Vec<&'static str>> {
        self.settle(py)?;
        let optimizer = self.shared.try_use().or_raise(py)?;
        if !optimizer.has_state(index) {
            return Ok(Vec::new());
        }
        let declaration = optimizer.preset().declaration();
        let step = declaration.shows_step.then_some("step");
        let scalars = declaration.scalars.iter().map(|s| s.name);
        Ok(step.into_iter().chain(scalars).chain(optimizer.slot_keys(index)).collect())
    }

    /// Updates applied to a parameter.
    fn step_of(&self, py: Python<'_>, index: usize) -> PyResult<u64> {
        self.settle(py)?;
        Ok(self.shared.try_use().or_raise(py)?.entries()[index].step)
    }

    /// Sets a parameter's count of updates.
    fn set_step_of(&self, py: Python<'_>, index: usize, step: u64) -> PyResult<()> {
        self.settle(py)?;
        self.shared.try_use().or_raise(py)?.set_step(index, step);
        Ok(())
    }

    /// One slot: a view on the CPU, a read-only copy on a GPU, a float where it is a number; a read-only copy of
    /// state that all parameters share; None where it does not exist.
    fn slot<'py>(&self, py: Python<'py>, index: usize, key: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.settle(py)?;
        let find = || {
            guarded("state", || {
                let mut optimizer = self.shared.try_use()?;
                let buffer = optimizer.slot(index, key).zip(optimizer.slot_form(index, key));
                let copy = if buffer.is_none() && self.on_gpu { optimizer.slot_array(index, key)? } else { None };
                Ok((buffer, copy, optimizer.scalar(index, key), optimizer.joint_value(index, key)?))
            })
        };
        let found = if self.on_gpu { py.detach(find) } else { find() };
        let (buffer, copy, scalar, joint) = found.or_raise(py)?;
        if let Some(value) = joint {
            return files::read_only(files::from_tree(py, value.into())?).map(Some);
        }
        if let Some(x) = scalar {
            return Ok(Some(PyFloat::new(py, x).into_any()));
        }
        if let Some((buffer, (shape, dtype))) = buffer {
            return arrays::view(py, &buffer, &shape, dtype).map(Some);
        }
        let Some(copy) = copy else { return Ok(None) };
        let array = arrays::from_bytes(py, copy.dtype.name(), &copy.shape, &copy.bytes)?;
        array.call_method1("setflags", (false,))?;
        Ok(Some(array))
    }

    /// Sets a slot that is a number.
    fn set_scalar(&self, py: Python<'_>, index: usize, key: &str, value: f64) -> PyResult<()> {
        self.settle(py)?;
        self.shared.try_use().or_raise(py)?.set_scalar(index, key, value);
        Ok(())
    }

    /// Returns a parameter to step 0 without state.
    fn reset(&self, py: Python<'_>, index: usize) -> PyResult<()> {
        self.settle(py)?;
        self.shared.try_use().and_then(|mut optimizer| optimizer.reset(index)).or_raise(py)
    }

    /// Hyperparameters of a group, as the engine holds them.
    fn hypers<'py>(&self, py: Python<'py>, group: usize) -> PyResult<Bound<'py, PyDict>> {
        let hypers = self.shared.try_use().map(|optimizer| optimizer.groups()[group].clone()).or_raise(py)?;
        values::to_dict(py, hypers.iter())
    }

    /// A copy of everything but the parameters' values, in torch's layout.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let _inside = enter(py);
        let tree = py.detach(|| {
            guarded(self.name(), || {
                let mut optimizer = self.shared.try_use()?;
                let shows_step = optimizer.preset().declaration().shows_step;
                Ok(optimizer.state_dict()?.into_tree(shows_step))
            })
        });
        files::from_tree(py, tree.or_raise(py)?)
    }

    /// Reads a saved state in torch's layout and makes every check of a load, which has changed nothing yet.
    #[pyo3(signature = (saved, rules=load::Rules::default(), hypers=None))]
    fn prepare_load(
        &self,
        py: Python<'_>,
        saved: &Bound<'_, PyDict>,
        rules: load::Rules,
        hypers: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Loading> {
        let place = format!("{}.load_state_dict", self.name());
        let tree = files::to_tree(saved, &place, "state_dict", Taking::Lent)?;
        let _inside = enter(py);
        let known = self.shared.try_use().or_raise(py)?.preset().hypers();
        let hypers = hypers.map_or(Ok(Vec::new()), |given| values::hypers(given, &known, &place))?;
        let options = load::options(rules, hypers);
        let prepare = || {
            let mut optimizer = self.shared.try_use()?;
            let declared = optimizer.preset().declaration().hypers;
            let saved = StateDict::from_tree(tree, Some(declared))?;
            let report = optimizer.check_load(&saved, &options)?;
            Ok(Loading { saved, options, report })
        };
        py.detach(|| guarded(&place, prepare)).or_raise(py)
    }

    /// Replaces hyperparameters and state by those that were prepared, checked once more.
    fn load(&self, py: Python<'_>, loading: &Loading) -> PyResult<()> {
        let _inside = enter(py);
        let load = || self.shared.try_use()?.load_state_dict_with(&loading.saved, &loading.options).map(drop);
        py.detach(|| guarded(self.name(), load)).or_raise(py)
    }

    /// Names of the state that all parameters share.
    #[getter]
    fn joint_keys(&self, py: Python<'_>) -> PyResult<Vec<&'static str>> {
        let joint = self.shared.try_use().or_raise(py)?.preset().declaration().joint;
        Ok(joint.iter().map(|s| s.name).collect())
    }

    /// Applied updates.
    #[getter]
    fn update_count(&self, py: Python<'_>) -> PyResult<u64> {
        self.settle(py)?;
        Ok(self.shared.try_use().or_raise(py)?.update_count())
    }

    /// Updates left out because a gradient was not finite.
    #[getter]
    fn skip_count(&self, py: Python<'_>) -> PyResult<u64> {
        self.settle(py)?;
        Ok(self.shared.try_use().or_raise(py)?.skip_count())
    }

    /// What the coming gradients were multiplied by.
    #[getter]
    fn grad_scale(&self, py: Python<'_>) -> PyResult<f64> {
        Ok(self.shared.try_use().or_raise(py)?.grad_scale())
    }

    #[setter]
    fn set_grad_scale(&self, py: Python<'_>, scale: f64) -> PyResult<()> {
        self.shared.try_use().and_then(|mut optimizer| optimizer.set_grad_scale(scale)).or_raise(py)
    }

    /// The norm of the last step's gradients, where it is bounded.
    #[getter]
    fn gradient_norm(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        if !self.on_gpu {
            return self.shared.try_use().and_then(|mut optimizer| optimizer.gradient_norm()).or_raise(py);
        }
        let _inside = enter(py);
        py.detach(|| guarded(self.name(), || self.shared.try_use()?.gradient_norm())).or_raise(py)
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

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(table) = self.table.try_lock() {
            for registered in &table.params {
                visit.call(&registered.array)?;
                if let Some(owner) = &registered.owner {
                    visit.call(owner)?;
                }
                if let Some(parameter) = &registered.parameter {
                    visit.call(parameter)?;
                }
            }
        }
        Ok(())
    }
}

impl Engine {
    /// Waits until it is known what became of the last step on a device.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        if !self.on_gpu {
            return Ok(());
        }
        let _inside = enter(py);
        py.detach(|| guarded(self.name(), || self.shared.try_use()?.settle())).or_raise(py)
    }

    /// Looks at a gradient on a device: shape and dtype of its parameter.
    fn look_at_array(
        &self,
        py: Python<'_>,
        table: &Table,
        index: usize,
        array: &DeviceArray,
        place: &str,
    ) -> PyResult<TensorRef<'static>> {
        let want = &table.params[index].seen;
        let label = || format!("gradient of {}", table.params[index].label);
        if array.extents() != want.shape() {
            let allowed = format!("of shape {}", shape_text(want.shape()));
            let got = shape_text(array.extents());
            return Err(refuse(py, ErrorKind::Value, place, &label(), allowed, got, None));
        }
        if !want.dtype.takes(array.stores()) {
            let allowed = gradient_dtypes(want.dtype);
            return Err(refuse(py, ErrorKind::Type, place, &label(), allowed, array.stores(), None));
        }
        Ok(array.as_gradient())
    }

    /// Calls the engine with the parameters and these gradients, after every check.
    #[allow(clippy::too_many_arguments, reason = "a step, an accumulation and an evaluation differ in each of them")]
    fn with_gradients<T: Send>(
        &self,
        py: Python<'_>,
        place: &str,
        gradients: Option<&Bound<'_, PyList>>,
        access: Access,
        haste: Haste,
        average: Option<&mut Lent<'_>>,
        call: impl FnOnce(
            &mut Optimizer,
            Besides<'_, '_>,
            &mut [TensorMut<'_>],
            &[Option<TensorRef<'_>>],
        ) -> roptim::Result<T>
        + Send,
    ) -> PyResult<T> {
        let mut guard = self.table_in(py, haste)?;
        let table = &mut *guard;
        // Whatever may run Python code or give up the interpreter lock comes first; from `verify` on nothing
        // does, up to the engine's own step.
        let mut arrays = recycled(std::mem::take(&mut table.places));
        self.collect(py, table, gradients, access, place, &mut arrays)?;
        self.renew_views(py, table, place, |index| arrays[index].is_some())?;
        self.settle_homes(py, table)?;
        if let Some(average) = &average {
            average.engine.settle_homes(py, &average.table)?;
        }
        self.verify(py, table, place, haste)?;
        let mut tensors = std::mem::take(&mut table.gradients);
        tensors.resize(arrays.len(), None);
        // What holds more than an address is not kept until the next step.
        let mut is_light = true;
        let mut work = 0;
        for (index, (array, tensor)) in arrays.iter().zip(&mut tensors).enumerate() {
            match array {
                None => *tensor = None,
                Some(Given::Device(array)) => {
                    is_light = false;
                    *tensor = Some(self.look_at_array(py, table, index, array.get(), place)?);
                }
                Some(Given::Host(gradient)) => {
                    let registered = &table.params[index];
                    let known = registered.recognized(gradient, access, table.epoch);
                    if let (Some(address), Some(tensor)) = (known, tensor.as_mut())
                        // SAFETY: as below; dtype and length are the parameter's, like those of the gradient before.
                        && unsafe { tensor.move_to(address, registered.seen.raw.dtype) }
                    {
                        work += registered.work(&registered.seen.raw, false);
                        continue;
                    }
                    is_light &= gradient.touched.is_none();
                    let raw = self.look_at_gradient(py, table, index, gradient, access, place)?;
                    work += table.params[index].work(&raw, gradient.touched.is_some());
                    // SAFETY: address, alignment, dtype and overlap with everything the step writes were looked at
                    // just now, and `arrays` holds the array until the step is over.
                    let looked_at = unsafe { TensorRef::from_raw(raw) };
                    *tensor = Some(match &gradient.touched {
                        Some(rows) => looked_at.of_rows(rows.clone()),
                        None => looked_at,
                    });
                }
            }
        }
        if access == Access::Write {
            self.refuse_common_memory(py, table, &arrays, &tensors, place)?;
        }
        let joined = average.map(|average| average.joined(py, table, &tensors, place)).transpose()?;
        let run = |optimizer: &mut Optimizer, besides: Besides<'_, '_>, params: &mut [TensorMut<'_>]| {
            call(optimizer, besides, params, &tensors)
        };
        let outcome = self.call(py, place, table, work, haste, joined, run);
        table.places = recycled(arrays);
        if is_light {
            table.gradients = tensors;
        }
        outcome
    }

    /// Refuses gradients that share memory with each other: a step that sets them to zero could do so before it has
    /// read all.
    fn refuse_common_memory(
        &self,
        py: Python<'_>,
        table: &Table,
        arrays: &[Option<Given<'_>>],
        tensors: &[Option<TensorRef<'_>>],
        place: &str,
    ) -> PyResult<()> {
        let intervals = tensors.iter().enumerate().filter_map(|(i, g)| Some(Interval::of(g.as_ref()?.raw(), i, false)));
        let map = Map::new(intervals.collect());
        for (index, (array, tensor)) in arrays.iter().zip(tensors).enumerate() {
            let (Some(Given::Host(Gradient { array, touched: None })), Some(tensor)) = (array, tensor) else {
                continue;
            };
            let label = &table.params[index].label;
            for other in map.meeting(tensor.raw()).filter(|other| other.index < index) {
                let Some(Given::Host(met)) = &arrays[other.index] else { continue };
                let Some(met_tensor) = &tensors[other.index] else { continue };
                if share_memory((array, tensor.raw()), (&met.array, met_tensor.raw())) {
                    let (label, got) = (format!("gradient of {label}"), &table.params[other.index].label);
                    let got = format!("memory of the gradient of {got}");
                    let remedy = Some("step without zero_grad and clear them afterwards");
                    return Err(refuse(py, ErrorKind::Value, place, &label, "memory of its own", got, remedy));
                }
            }
        }
        Ok(())
    }

    /// Calls the engine with the parameters, after every check.
    fn with_parameters<T: Send>(
        &self,
        py: Python<'_>,
        haste: Haste,
        call: impl FnOnce(&mut Optimizer, &mut [TensorMut<'_>]) -> roptim::Result<T> + Send,
    ) -> PyResult<T> {
        self.with_parameters_and(py, haste, None, |optimizer, _, params| call(optimizer, params))
    }

    /// [`Engine::with_parameters`], and with the average that joins them.
    fn with_parameters_and<T: Send>(
        &self,
        py: Python<'_>,
        haste: Haste,
        average: Option<&mut Lent<'_>>,
        call: impl FnOnce(&mut Optimizer, Besides<'_, '_>, &mut [TensorMut<'_>]) -> roptim::Result<T> + Send,
    ) -> PyResult<T> {
        let mut guard = self.table_in(py, haste)?;
        self.renew_views(py, &mut guard, &self.step, |_| true)?;
        self.settle_homes(py, &guard)?;
        if let Some(average) = &average {
            average.engine.settle_homes(py, &average.table)?;
        }
        self.verify(py, &mut guard, &self.step, haste)?;
        let joined = average.map(|average| average.joined(py, &guard, &[], &self.step)).transpose()?;
        let work = guard.params.iter().map(|registered| registered.work(&registered.seen.raw, false)).sum();
        self.call(py, &self.step, &mut guard, work, haste, joined, call)
    }

    /// Calls the engine with the parameters of a table that was verified just now, without the interpreter lock
    /// where the work is worth it.
    #[allow(clippy::too_many_arguments, reason = "what was found out of the arrays, and how to call")]
    fn call<T: Send>(
        &self,
        py: Python<'_>,
        place: &str,
        table: &mut Table,
        mut work: usize,
        haste: Haste,
        mut joined: Option<Joined<'_>>,
        call: impl FnOnce(&mut Optimizer, Besides<'_, '_>, &mut [TensorMut<'_>]) -> roptim::Result<T> + Send,
    ) -> PyResult<T> {
        if joined.is_some() {
            work = work.saturating_mul(2);
        }
        let (made_in, mut targets) = std::mem::take(&mut table.targets);
        if made_in != table.epoch {
            targets.clear();
            // SAFETY: `verify` looked at the arrays just now, and at overlap between them; the table holds them. What
            // it finds to have changed begins another epoch.
            targets.extend(table.params.iter().map(|r| unsafe { TensorMut::from_raw(r.seen.raw.clone()) }));
        }
        let run = || {
            guarded(place, || {
                let mut optimizer = self.shared.in_haste(haste)?;
                // From here on nobody takes a parameter to another home, or begins to write to it, without waiting.
                self.refuse_moved(place, table)?;
                match &mut joined {
                    None => call(&mut optimizer, Besides::default(), &mut targets),
                    Some((shared, averages)) => {
                        let mut average = shared.try_use()?;
                        let besides = Besides { average: Some((&mut average, averages)), measures: false };
                        call(&mut optimizer, besides, &mut targets)
                    }
                }
            })
        };
        let is_small = work < self.release_lock_from && !self.on_gpu && haste == Haste::Now;
        let outcome = if is_small { run() } else { py.detach(run) };
        table.targets = (table.epoch, targets);
        outcome.or_raise(py)
    }

    /// Refuses to step Parameters that another thread took elsewhere, or is writing to, since they were looked at.
    fn refuse_moved(&self, place: &str, table: &Table) -> roptim::Result<()> {
        if !self.houses_parameters() {
            return Ok(());
        }
        for (index, registered) in table.params.iter().enumerate() {
            let Some(parameter) = registered.parameter.as_ref().map(|p| p.get()) else { continue };
            let is_here = parameter.home().is_some_and(|home| home.is_of(&self.shared, index));
            if !is_here || parameter.is_lent() {
                let sentence = format!("{place}: another thread is using {}", registered.label);
                return Err(roptim::Error::plain(ErrorKind::Concurrent, sentence)
                    .with_remedy("use a parameter from one thread at a time"));
            }
        }
        Ok(())
    }

    fn table_in(&self, py: Python<'_>, haste: Haste) -> PyResult<MutexGuard<'_, Table>> {
        loop {
            match self.table(py) {
                Err(_) if haste == Haste::Wait => py.detach(|| std::thread::sleep(Duration::from_micros(20))),
                other => return other,
            }
        }
    }

    /// Ends a step under way after an error in it. Where the arrays cannot be restored, because the closure
    /// closed one to writing, say, the optimizer is torn and the error gets a note.
    fn abandon(&self, py: Python<'_>, error: &PyErr) -> PyResult<()> {
        let restored = self.with_parameters(py, Haste::Wait, |optimizer, params| optimizer.abandon(Some(params)));
        if let Err(obstacle) = restored {
            py.detach(|| guarded(&self.step, || self.shared.wait().abandon(None))).or_raise(py)?;
            let note = format!("The parameters could not be restored: {}", obstacle.value(py));
            error.value(py).call_method1("add_note", (note,))?;
        }
        Ok(())
    }

    /// A Parameter's truth follows the optimizer that steps it: what another one's device holds is
    /// brought to the host first.
    fn settle_homes(&self, py: Python<'_>, table: &Table) -> PyResult<()> {
        for (index, registered) in table.params.iter().enumerate() {
            let Some(parameter) = registered.parameter.as_ref().map(|p| p.get()) else { continue };
            if !self.houses_parameters() && parameter.is_on_host() {
                continue;
            }
            loop {
                let home = parameter.home();
                if home.is_some() && parameter.is_lent() {
                    let sentence = format!("{}.step: {} is being written to", self.name(), registered.label);
                    let error = roptim::Error::plain(ErrorKind::Concurrent, sentence)
                        .with_remedy("step after its host() block, and from one thread at a time");
                    return Err(raise(py, &error));
                }
                let settled = match &home {
                    Some(home) => self.houses_parameters() && home.is_of(&self.shared, index),
                    None => !self.houses_parameters() && !parameter.is_away(),
                };
                if settled {
                    break;
                }
                self.shared.host_written(index);
                let here = || Home { shared: Arc::clone(&self.shared), index };
                // The table holds the array, too.
                let alone = registered.array.is(parameter.host(py)) && parameter.is_alone(py, 1);
                parameter.move_home(py, home.as_ref(), self.houses_parameters().then(here), alone)?;
            }
        }
        Ok(())
    }
}
