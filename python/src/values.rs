//! Hyperparameters between Python and the engine. Ranges are the engine's business; here only types.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict};
use roptim::{ErrorKind, Hypers, Value};

use crate::errors::refuse;

/// A number: a Python or NumPy number, or an array of one element. A bool is none.
fn number(object: &Bound<'_, PyAny>) -> Option<f64> {
    if object.is_instance_of::<PyBool>() || object.is_instance_of::<pyo3::types::PyString>() {
        return None;
    }
    if let Ok(x) = object.extract::<f64>() {
        return Some(x);
    }
    let one = object.getattr("size").ok()?.extract::<usize>().ok()? == 1;
    if one { object.call_method0("item").ok()?.extract().ok() } else { None }
}

fn switch(object: &Bound<'_, PyAny>) -> Option<bool> {
    if let Ok(b) = object.cast::<PyBool>() {
        return Some(b.is_true());
    }
    let name = object.get_type().name().ok()?;
    (name == "bool" || name == "bool_").then(|| object.is_truthy().ok()).flatten()
}

fn pair(object: &Bound<'_, PyAny>) -> Option<[f64; 2]> {
    let items: Vec<Bound<'_, PyAny>> = object.try_iter().ok()?.collect::<PyResult<_>>().ok()?;
    match items.as_slice() {
        [a, b] => Some([number(a)?, number(b)?]),
        _ => None,
    }
}

/// The engine's values of a dict of hyperparameters; the declared default gives the wanted type.
pub(crate) fn hypers(given: &Bound<'_, PyDict>, known: &Hypers, place: &str) -> PyResult<Vec<(String, Value)>> {
    let mut out = Vec::with_capacity(given.len());
    for (name, object) in given.iter() {
        let name: String = name.extract()?;
        let declared = known.declared().iter().find(|h| h.name == name);
        let value = match declared.map(|h| h.default) {
            Some(Value::Bool(_)) => switch(&object).map(Value::Bool),
            Some(Value::Pair(_)) => pair(&object).map(Value::Pair),
            // An unknown name goes on as a number: the engine refuses it by name.
            _ => number(&object).map(Value::Float).or_else(|| declared.is_none().then_some(Value::Float(0.0))),
        };
        let Some(value) = value else {
            let got = object.repr().map_or_else(|_| "something unprintable".into(), |r| r.to_string());
            let allowed = declared.map(|h| h.range.to_string()).unwrap_or_default();
            return Err(refuse(given.py(), ErrorKind::Type, place, &name, allowed, got, None));
        };
        out.push((name, value));
    }
    Ok(out)
}

/// A dict of values in Python's types.
pub(crate) fn to_dict<'py>(
    py: Python<'py>,
    values: impl Iterator<Item = (&'static str, Value)>,
) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    for (name, value) in values {
        match value {
            Value::Bool(b) => out.set_item(name, b)?,
            Value::Float(x) => out.set_item(name, x)?,
            Value::Pair([a, b]) => out.set_item(name, (a, b))?,
        }
    }
    Ok(out)
}
