//! The part of `Parameter` that the step reads without Python attribute look-ups.

use std::sync::Mutex;

use numpy::PyUntypedArray;
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::arrays::{Access, Context, as_array, look};
use crate::errors::{OrRaise, guarded};
use crate::shared::{self, Home};
use crate::values::{flag, text};

/// An array that a parameter does not use for the time being.
struct Wrapped {
    array: Py<PyUntypedArray>,
    /// Of its values.
    fingerprint: u64,
}

struct Fields {
    /// What is read and written; while a device has the truth, memory that nobody else knows, and read-only.
    data: Py<PyUntypedArray>,
    /// The array that was wrapped, where a device has the truth and somebody else knows that array: read-only too,
    /// so that writing to it is an error and not lost.
    wrapped: Option<Wrapped>,
    grad: Option<Py<PyAny>>,
    requires_grad: bool,
    name: Option<String>,
    home: Option<Home>,
    /// Whether `data` is read-only and nobody else's, for a device.
    away: bool,
    /// Writes under way that take the place of the values.
    lent: usize,
}

impl Drop for ParameterBase {
    /// Whoever still has the wrapped array finds the values there, as on the CPU.
    fn drop(&mut self) {
        if self.with(|f| f.wrapped.is_some()) {
            // There is nobody to tell what fails here; without an interpreter there is nothing to save.
            let _ = Python::try_attach(|py| {
                // The first try may be told of an update that was left out.
                let _ = self.bring_home(py).or_else(|_| self.bring_home(py));
                self.with(|f| f.home = None);
                self.set_away(py, false, false)
            });
        }
    }
}

fn fingerprint(array: &Bound<'_, PyUntypedArray>) -> PyResult<u64> {
    let seen = look(array, Access::Read, Context { place: "Parameter", label: "the wrapped array" })?;
    Ok(shared::fingerprint(&seen.raw))
}

fn set_writeable(array: &Bound<'_, PyUntypedArray>, writeable: bool) -> PyResult<()> {
    array.call_method1("setflags", (writeable,)).map(|_| ())
}

/// Whether an array's memory belongs to it, or to arrays that only it knows.
fn owns_alone(array: &Bound<'_, PyUntypedArray>) -> bool {
    let Ok(base) = array.getattr("base") else { return false };
    if base.is_none() {
        return true;
    }
    // This reference and the array's.
    references(&base).is_ok_and(|count| count <= 2) && base.cast_exact::<PyUntypedArray>().is_ok_and(owns_alone)
}

/// How many references to an object there are.
fn references(object: &Bound<'_, PyAny>) -> PyResult<usize> {
    let count = object.py().import("sys")?.getattr("getrefcount")?;
    let of = |object: &Bound<'_, PyAny>| count.call1((object,))?.extract::<usize>();
    // Asking holds some itself: as many as of an object that has one.
    let fresh = object.py().import("builtins")?.getattr("object")?.call0()?;
    Ok(of(object)? + 1 - of(&fresh)?)
}

/// Array, gradient and flags of a parameter.
#[pyclass(subclass, weakref, frozen, module = "roptim._roptim")]
pub(crate) struct ParameterBase {
    fields: Mutex<Fields>,
}

impl ParameterBase {
    fn with<T>(&self, read: impl FnOnce(&mut Fields) -> T) -> T {
        // Nothing below can panic while it holds the lock; a poisoned one still holds valid fields.
        read(&mut self.fields.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// The wrapped array, whatever the device knows.
    pub(crate) fn host<'py>(&self, py: Python<'py>) -> Bound<'py, PyUntypedArray> {
        self.with(|f| f.data.clone_ref(py)).into_bound(py)
    }

    /// The gradient that a step uses: none where gradients are not wanted.
    pub(crate) fn step_gradient<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.with(|f| if f.requires_grad { f.grad.as_ref().map(|g| g.clone_ref(py)) } else { None })
            .map(|g| g.into_bound(py))
    }

    pub(crate) fn wants_gradient(&self) -> bool {
        self.with(|f| f.requires_grad)
    }

    /// Whether the array is read-only, for a device.
    pub(crate) fn is_away(&self) -> bool {
        self.with(|f| f.away)
    }

    /// Whether no device has anything to do with it.
    pub(crate) fn is_on_host(&self) -> bool {
        self.with(|f| f.home.is_none() && !f.away)
    }

    /// Whether a write is under way that takes the place of the values.
    pub(crate) fn is_lent(&self) -> bool {
        self.with(|f| f.lent > 0)
    }

    pub(crate) fn label(&self) -> Option<String> {
        self.with(|f| f.name.clone())
    }

    pub(crate) fn home(&self) -> Option<Home> {
        self.with(|f| f.home.clone())
    }

    /// Whether nobody else can reach the array's memory; `held` are the references that the engine has itself.
    pub(crate) fn is_alone(&self, py: Python<'_>, held: usize) -> bool {
        let array = self.host(py);
        // Besides: this one, and the parameter's own.
        references(&array).is_ok_and(|count| count <= held + 2) && owns_alone(&array)
    }

    /// Moves the truth from where it is, if it still is `from` there; whether it was. What a device has is brought home
    /// first, and nothing comes between that and the move.
    pub(crate) fn move_home(
        &self,
        py: Python<'_>,
        from: Option<&Home>,
        to: Option<Home>,
        alone: bool,
    ) -> PyResult<bool> {
        let is_away = to.is_some();
        let swap = || {
            self.with(|f| {
                let is_there = match (&f.home, from) {
                    (None, None) => true,
                    (Some(now), Some(from)) => now.is(from),
                    _ => false,
                };
                if is_there {
                    f.home = to;
                }
                is_there
            })
        };
        let moved = match from {
            None => swap(),
            Some(home) => {
                let array = self.host(py);
                let context = Context { place: "Parameter.data", label: "the wrapped array" };
                let seen = look(&array, Access::Read, context)?;
                let leave = || home.shared.brought_home(home.index, &seen.raw, swap);
                py.detach(|| guarded("Parameter.data", leave)).or_raise(py)?
            }
        };
        if moved {
            self.set_away(py, is_away, alone)?;
        }
        Ok(moved)
    }

    /// For a device the array becomes read-only and, unless nobody else knows it (`alone`), a copy takes its place; back
    /// on the host the wrapped array has the values again.
    fn set_away(&self, py: Python<'_>, away: bool, alone: bool) -> PyResult<()> {
        let was_away = self.is_away();
        if away && !was_away {
            let array = self.host(py);
            if !alone {
                let copy: Bound<'_, PyUntypedArray> = array.call_method0("copy")?.cast_into().map_err(PyErr::from)?;
                set_writeable(&array, false)?;
                set_writeable(&copy, false)?;
                let fingerprint = fingerprint(&array)?;
                self.with(|f| {
                    let array = std::mem::replace(&mut f.data, copy.unbind());
                    f.wrapped = Some(Wrapped { array, fingerprint });
                });
            } else {
                set_writeable(&array, false)?;
            }
        } else if !away && was_away {
            let array = self.host(py);
            let wrapped = self.with(|f| f.wrapped.as_ref().map(|w| (w.array.clone_ref(py), w.fingerprint)));
            match wrapped {
                None => set_writeable(&array, true)?,
                Some((wrapped, before)) => {
                    let bound = wrapped.bind(py);
                    if fingerprint(bound)? != before {
                        let text = "Parameter: the array that it wrapped was written to while a device had the values, \
                                    which take its place now; write through p.data = x";
                        py.import("warnings")?.call_method1("warn", (text, py.get_type::<PyRuntimeWarning>(), 2))?;
                    }
                    set_writeable(bound, true)?;
                    py.import("numpy")?.call_method1("copyto", (bound, &array))?;
                    self.with(|f| (f.data, f.wrapped) = (wrapped, None));
                }
            }
        }
        self.with(|f| f.away = away);
        Ok(())
    }

    /// Brings the device's values to the host array if the device is ahead.
    pub(crate) fn bring_home(&self, py: Python<'_>) -> PyResult<()> {
        let Some(home) = self.home() else { return Ok(()) };
        // Waiting for a step of another thread must not keep it from the interpreter.
        if !py.detach(|| home.shared.host_is_stale(home.index)) {
            return Ok(());
        }
        let array = self.host(py);
        let seen = look(&array, Access::Read, Context { place: "Parameter.data", label: "the wrapped array" })?;
        py.detach(|| guarded("Parameter.data", || home.shared.sync(home.index, &seen.raw))).or_raise(py)
    }
}

/// Whether steps change a parameter.
struct RequiresGrad(bool);

impl<'a, 'py> FromPyObject<'a, 'py> for RequiresGrad {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        flag(&object, "Parameter", "requires_grad").map(Self)
    }
}

fn named(name: Option<&Bound<'_, PyAny>>) -> PyResult<Option<String>> {
    name.map(|name| text(name, "Parameter", "name")).transpose()
}

#[pymethods]
impl ParameterBase {
    #[new]
    #[pyo3(signature = (data, requires_grad=RequiresGrad(true), name=None), text_signature = "(data, requires_grad=True, name=None)")]
    fn new(data: &Bound<'_, PyAny>, requires_grad: RequiresGrad, name: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let name = named(name)?;
        let context = Context { place: "Parameter", label: "data" };
        let array = as_array(data, Access::Write, context)?;
        look(&array, Access::Write, context)?;
        let fields = Fields {
            data: array.unbind(),
            wrapped: None,
            grad: None,
            requires_grad: requires_grad.0,
            name,
            home: None,
            away: false,
            lent: 0,
        };
        Ok(Self { fields: Mutex::new(fields) })
    }

    /// The wrapped array after the device's values, if they are newer, have been brought to it.
    fn _host(&self, py: Python<'_>) -> PyResult<Py<PyUntypedArray>> {
        self.bring_home(py)?;
        Ok(self.host(py).unbind())
    }

    /// The wrapped array as the host last saw it, for its shape and dtype.
    #[getter]
    fn _array(&self, py: Python<'_>) -> Py<PyUntypedArray> {
        self.host(py).unbind()
    }

    /// The host array was written to: it is the truth now.
    fn _host_written(&self, py: Python<'_>) {
        if let Some(home) = self.home() {
            py.detach(|| home.shared.host_written(home.index));
        }
    }

    /// A write begins, or ends, that takes the place of the values: no step may come between.
    fn _lend(&self, begins: bool) {
        self.with(|f| f.lent = if begins { f.lent + 1 } else { f.lent.saturating_sub(1) });
    }

    /// Whether a device holds the truth between steps.
    #[getter]
    fn _on_device(&self) -> bool {
        self.with(|f| f.home.is_some())
    }

    #[getter]
    fn grad<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.with(|f| f.grad.as_ref().map(|g| g.clone_ref(py))).map(|g| g.into_bound(py))
    }

    #[setter]
    fn set_grad(&self, value: Option<Py<PyAny>>) {
        // The old gradient is dropped after the lock is released: dropping may run Python code.
        let _old = self.with(|f| std::mem::replace(&mut f.grad, value));
    }

    #[getter]
    fn requires_grad(&self) -> bool {
        self.wants_gradient()
    }

    #[setter]
    fn set_requires_grad(&self, value: RequiresGrad) {
        self.with(|f| f.requires_grad = value.0);
    }

    #[getter]
    fn name(&self) -> Option<String> {
        self.label()
    }

    #[setter]
    fn set_name(&self, value: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let name = named(value)?;
        self.with(|f| f.name = name);
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(fields) = self.fields.try_lock() {
            visit.call(&fields.data)?;
            if let Some(wrapped) = &fields.wrapped {
                visit.call(&wrapped.array)?;
            }
            if let Some(grad) = &fields.grad {
                visit.call(grad)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        self.set_grad(None);
    }
}
