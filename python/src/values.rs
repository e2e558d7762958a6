//! Hyperparameters between Python and the engine. Ranges are the engine's business; here only types.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyString};
use roptim::hyper::Choice;
use roptim::{ErrorKind, Hypers, Range, Value};

use crate::errors::{refuse, told};

/// A number: a Python or NumPy number, or an array of one element. A bool is none, nor is what is masked.
fn number(object: &Bound<'_, PyAny>) -> Option<f64> {
    if object.is_exact_instance_of::<PyFloat>() {
        return object.extract().ok();
    }
    if object.is_instance_of::<PyBool>() || object.is_instance_of::<PyString>() {
        return None;
    }
    // NumPy's own conversion would take bools and times, and complex numbers with a warning.
    let Ok(size) = object.getattr("size").and_then(|size| size.extract::<usize>()) else {
        return object.extract().ok();
    };
    let is_time = || object.getattr("dtype")?.getattr("kind")?.extract::<String>().map(|kind| "mM".contains(&kind));
    let is_masked = || object.getattr("mask")?.is_truthy();
    if size != 1 || is_time().unwrap_or(false) || is_masked().unwrap_or(false) {
        return None;
    }
    let item = object.call_method0("item").ok()?;
    // A number of more bits than a float is its own item.
    if item.hasattr("size").ok()? { item.extract().ok() } else { number(&item) }
}

/// Text, unless it has surrogates, which neither files nor the engine hold.
pub(crate) fn text(object: &Bound<'_, PyAny>, place: &str, name: &str) -> PyResult<String> {
    let py = object.py();
    if !object.is_instance_of::<PyString>() {
        return Err(refuse(py, ErrorKind::Type, place, name, "text", told(object), None));
    }
    object.extract().map_err(|_| {
        let got = object.call_method0("__repr__").and_then(|r| r.call_method1("encode", ("ascii", "replace")));
        let got = got.and_then(|b| b.extract::<Vec<u8>>()).unwrap_or_default();
        let got = String::from_utf8_lossy(&got).into_owned();
        refuse(py, ErrorKind::Value, place, name, "text that UTF-8 can hold", got, None)
    })
}

/// A switch; of anything else the truth is seldom what was meant.
pub(crate) fn flag(object: &Bound<'_, PyAny>, place: &str, name: &str) -> PyResult<bool> {
    switch(object).ok_or_else(|| refuse(object.py(), ErrorKind::Type, place, name, "True or False", told(object), None))
}

fn switch(object: &Bound<'_, PyAny>) -> Option<bool> {
    if let Ok(b) = object.cast::<PyBool>() {
        return Some(b.is_true());
    }
    let name = object.get_type().name().ok()?;
    (name == "bool" || name == "bool_").then(|| object.is_truthy().ok()).flatten()
}

/// The items of what has some in an order of its own: not of sets or dicts.
fn items<'py>(object: &Bound<'py, PyAny>) -> Option<Vec<Bound<'py, PyAny>>> {
    let is_text = object.is_instance_of::<PyString>() || object.is_instance_of::<PyBytes>();
    let is_ordered = object.hasattr("__getitem__").ok()? && !object.hasattr("keys").ok()?;
    if is_text || object.is_instance_of::<PyByteArray>() || !is_ordered {
        return None;
    }
    object.try_iter().ok()?.collect::<PyResult<_>>().ok()
}

fn numbers<const N: usize>(object: &Bound<'_, PyAny>) -> Option<[f64; N]> {
    let items: Vec<f64> = items(object)?.iter().map(number).collect::<Option<_>>()?;
    items.try_into().ok()
}

/// A whole number of 64 bits; a float that stands for one exactly.
fn whole(object: &Bound<'_, PyAny>) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if object.is_instance_of::<PyBool>() {
        return None;
    }
    match object.call_method0("__index__") {
        Ok(index) => index.extract().ok(),
        Err(_) => number(object).filter(|x| x.fract() == 0.0 && x.abs() <= EXACT).map(|x| x as i64),
    }
}

/// The value of an object in the type that a range asks for; `None` where it has another type.
fn value(object: &Bound<'_, PyAny>, range: &Range) -> Option<Value> {
    match range {
        Range::Flag => switch(object).map(Value::Bool),
        Range::PairFrom(..) | Range::PairAround(..) | Range::PairOrdered(_) => numbers(object).map(Value::Pair),
        Range::HalfPair(_) => match items(object)?.as_slice() {
            [first, second] if first.is_none() => number(second).map(Value::HalfPair),
            _ => numbers(object).map(Value::Pair),
        },
        Range::Triple => numbers(object).map(Value::Triple),
        Range::Whole(..) => whole(object).map(Value::Int),
        Range::OrNone(_) if object.is_none() => Some(Value::None),
        Range::OrNone(range) => value(object, range),
        Range::OneOf(_) => Choice::find(&object.extract::<String>().ok()?).map(Value::Choice),
        _ => number(object).map(Value::Float),
    }
}

/// Whether the type is right: another word, or a whole number of too many digits, is a wrong value.
fn is_of_type(object: &Bound<'_, PyAny>, range: &Range) -> bool {
    match range {
        Range::OrNone(range) => is_of_type(object, range),
        Range::OneOf(_) => object.is_instance_of::<PyString>(),
        Range::Whole(..) => is_large(object) || number(object).is_some_and(|x| x.fract() == 0.0),
        Range::Flag => false,
        _ => is_large(object),
    }
}

/// Whether it is an integer beyond all floats.
fn is_large(object: &Bound<'_, PyAny>) -> bool {
    object.is_instance_of::<PyInt>() && object.extract::<f64>().is_err()
}

/// The engine's values of a dict of hyperparameters; the declared range gives the wanted type.
pub(crate) fn hypers(given: &Bound<'_, PyDict>, known: &Hypers, place: &str) -> PyResult<Vec<(String, Value)>> {
    let mut out = Vec::with_capacity(given.len());
    for (name, object) in given.iter() {
        let name: String = name.extract()?;
        let declared = known.declared().iter().find(|h| h.name == name);
        // An unknown name goes on with any value: the engine refuses it by name.
        let value = declared.map_or(Some(Value::None), |h| value(&object, &h.range));
        let Some(value) = value else {
            let got = told(&object);
            let allowed = declared.map(|h| h.range.to_string()).unwrap_or_default();
            let typed = declared.is_some_and(|h| is_of_type(&object, &h.range));
            let kind = if typed { ErrorKind::Value } else { ErrorKind::Type };
            return Err(refuse(given.py(), kind, place, &name, allowed, got, None));
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
            Value::None => out.set_item(name, py.None())?,
            Value::Bool(b) => out.set_item(name, b)?,
            Value::Int(n) => out.set_item(name, n)?,
            Value::Float(x) => out.set_item(name, x)?,
            Value::Pair([a, b]) => out.set_item(name, (a, b))?,
            Value::HalfPair(b) => out.set_item(name, (py.None(), b))?,
            Value::Triple([a, b, c]) => out.set_item(name, (a, b, c))?,
            Value::Choice(choice) => out.set_item(name, choice.name())?,
        }
    }
    Ok(out)
}
