//! The part of `Parameter` that the step reads without Python attribute look-ups.

use std::sync::Mutex;

use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::arrays::{Access, Context, as_array, look};
use crate::errors::{OrRaise, guarded};
use crate::shared::Home;

struct Fields {
    data: Py<PyUntypedArray>,
    grad: Option<Py<PyAny>>,
    requires_grad: bool,
    name: Option<String>,
    home: Option<Home>,
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

    pub(crate) fn label(&self) -> Option<String> {
        self.with(|f| f.name.clone())
    }

    pub(crate) fn home(&self) -> Option<Home> {
        self.with(|f| f.home.clone())
    }

    pub(crate) fn set_home(&self, home: Option<Home>) {
        self.with(|f| f.home = home);
    }

    /// Brings the device's values to the host array if the device is ahead.
    pub(crate) fn bring_home(&self, py: Python<'_>) -> PyResult<()> {
        let Some(home) = self.home() else { return Ok(()) };
        // Waiting for a step of another thread must not keep it from the interpreter.
        if !py.detach(|| home.shared.host_is_stale(home.index)) {
            return Ok(());
        }
        let array = self.host(py);
        let seen = look(&array, Access::Write, Context { place: "Parameter.data", label: "the wrapped array" })?;
        py.detach(|| guarded("Parameter.data", || home.shared.sync(home.index, &seen.raw))).or_raise(py)
    }
}

#[pymethods]
impl ParameterBase {
    #[new]
    #[pyo3(signature = (data, requires_grad=true, name=None))]
    fn new(data: &Bound<'_, PyAny>, requires_grad: bool, name: Option<String>) -> PyResult<Self> {
        let context = Context { place: "Parameter", label: "data" };
        let array = as_array(data, Access::Write, context)?;
        look(&array, Access::Write, context)?;
        let fields = Fields { data: array.unbind(), grad: None, requires_grad, name, home: None };
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
    fn set_requires_grad(&self, value: bool) {
        self.with(|f| f.requires_grad = value);
    }

    #[getter]
    fn name(&self) -> Option<String> {
        self.label()
    }

    #[setter]
    fn set_name(&self, value: Option<String>) {
        self.with(|f| f.name = value);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(fields) = self.fields.try_lock() {
            visit.call(&fields.data)?;
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
