//! The one mapping from the engine's error kinds to Python's exception classes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use roptim::{Error, ErrorKind};

/// Name of the class in `roptim._errors`.
fn class(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Value => "RoptimValueError",
        ErrorKind::Type => "RoptimTypeError",
        ErrorKind::Name => "RoptimKeyError",
        ErrorKind::Nonfinite => "NonfiniteError",
        ErrorKind::Concurrent => "ConcurrentStepError",
        ErrorKind::Torn => "TornError",
        ErrorKind::NoAdapter => "NoAdapterError",
        ErrorKind::Device => "DeviceError",
        ErrorKind::DeviceLost => "DeviceLostError",
        ErrorKind::Forked => "ForkedGpuError",
        ErrorKind::OutOfMemory => "OutOfMemoryError",
        ErrorKind::File | ErrorKind::Newer => "CheckpointError",
        ErrorKind::Io => "CheckpointIOError",
        _ => "InternalError",
    }
}

/// The Python exception for an engine error, with its causes in the message's notes.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    let mut sentence = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !sentence.contains(&text) {
            sentence.push_str(&format!(" ({text})"));
        }
        cause = inner.source();
    }
    let made = py.import("roptim._errors").and_then(|m| m.getattr(class(error.kind()))?.call1((&sentence,)));
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(_) => PyRuntimeError::new_err(sentence),
    }
}

/// Turns a result of the engine into Python's.
pub(crate) trait OrRaise<T> {
    /// The value, or the exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for roptim::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|e| raise(py, &e))
    }
}

/// A refusal in the one sentence form.
pub(crate) fn refuse(
    py: Python<'_>,
    kind: ErrorKind,
    place: &str,
    name: &str,
    allowed: impl std::fmt::Display,
    got: impl std::fmt::Display,
    remedy: Option<&'static str>,
) -> PyErr {
    let error = Error::refuse(kind, place, name, allowed, got);
    raise(py, &if let Some(remedy) = remedy { error.with_remedy(remedy) } else { error })
}

/// A value as messages show it.
pub(crate) fn told(object: &Bound<'_, PyAny>) -> String {
    let told = object.py().import("roptim._errors").and_then(|errors| errors.call_method1("told", (object,)));
    told.and_then(|text| text.extract()).unwrap_or_else(|_| "something unprintable".into())
}

/// Runs engine code; a panic becomes an error that names it, never a crash of the interpreter.
pub(crate) fn guarded<T>(place: &str, run: impl FnOnce() -> roptim::Result<T>) -> roptim::Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        let what = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Err(Error::plain(ErrorKind::Internal, format!("{place}: the engine panicked: {what}"))
            .with_remedy("this is a defect of roptim, please report it"))
    })
}
