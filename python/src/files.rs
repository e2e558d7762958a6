//! Trees of Python values to files and back. The format is the engine's; here only types.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use roptim::checkpoint::{self, DataType, Key, MAX_DEPTH, TensorData, Tree};
use roptim::{Error, ErrorKind};

use crate::arrays;
use crate::errors::{OrRaise, guarded, raise, refuse};
use crate::parameter::ParameterBase;

const ALLOWED: &str = "None, bool, int, float, str, list, tuple, dict, a NumPy scalar or a numeric array";

fn described(object: &Bound<'_, PyAny>) -> String {
    let name = object.get_type().fully_qualified_name();
    format!("an object of type {}", name.map_or_else(|_| "unknown".into(), |n| n.to_string()))
}

fn tensor(object: &Bound<'_, PyAny>, place: &str, name: &str) -> PyResult<TensorData> {
    let py = object.py();
    let dtype = object.getattr("dtype")?;
    let dtype_name: String = dtype.getattr("name")?.extract()?;
    let Some(data_type) = DataType::from_name(&dtype_name) else {
        let got = format!("dtype {dtype_name}");
        return Err(refuse(py, ErrorKind::Type, place, name, "of a numeric dtype", got, None));
    };
    let native = if dtype.getattr("byteorder")?.extract::<String>()? == ">" {
        object.call_method1("astype", (dtype.call_method1("newbyteorder", ("=",))?,))?
    } else {
        object.clone()
    };
    let shape: Vec<usize> = object.getattr("shape")?.extract()?;
    TensorData::new(data_type, shape, arrays::to_bytes(&native)?).or_raise(py)
}

/// Text, unless it has surrogates, which no file holds.
fn text(object: &Bound<'_, PyAny>, place: &str, name: &str) -> PyResult<String> {
    object.extract().map_err(|_| {
        let got = object.call_method0("__repr__").and_then(|r| r.call_method1("encode", ("ascii", "replace")));
        let got = got.and_then(|b| b.extract::<Vec<u8>>()).unwrap_or_default();
        let got = String::from_utf8_lossy(&got).into_owned();
        refuse(object.py(), ErrorKind::Value, place, name, "text that UTF-8 can hold", got, None)
    })
}

/// A Python value as a tree. `name` is its place in the whole, for messages.
pub(crate) fn to_tree(object: &Bound<'_, PyAny>, place: &str, name: &str, depth: usize) -> PyResult<Tree> {
    let py = object.py();
    if depth > MAX_DEPTH {
        let allowed = format!("within {MAX_DEPTH} containers");
        return Err(refuse(py, ErrorKind::Value, place, name, allowed, "one more", None));
    }
    if object.is_none() {
        Ok(Tree::None)
    } else if let Ok(b) = object.cast_exact::<PyBool>() {
        Ok(Tree::Bool(b.is_true()))
    } else if object.is_exact_instance_of::<PyInt>() {
        match (object.extract::<i64>(), object.extract::<u64>()) {
            (Ok(x), _) => Ok(Tree::Int(x)),
            (_, Ok(x)) => Ok(Tree::from(x)),
            _ => Err(refuse(py, ErrorKind::Value, place, name, "an int of at most 64 bits", "a larger one", None)),
        }
    } else if let Ok(x) = object.cast_exact::<PyFloat>() {
        Ok(Tree::Float(x.value()))
    } else if object.is_exact_instance_of::<PyString>() {
        text(object, place, name).map(Tree::Str)
    } else if let Ok(list) = object.cast_exact::<PyList>() {
        let items = list.iter().enumerate();
        items
            .map(|(i, x)| to_tree(&x, place, &format!("{name}[{i}]"), depth + 1))
            .collect::<PyResult<_>>()
            .map(Tree::List)
    } else if let Ok(tuple) = object.cast_exact::<PyTuple>() {
        let items = tuple.iter().enumerate();
        items
            .map(|(i, x)| to_tree(&x, place, &format!("{name}[{i}]"), depth + 1))
            .collect::<PyResult<_>>()
            .map(Tree::Tuple)
    } else if let Ok(dict) = object.cast_exact::<PyDict>() {
        let mut items = Vec::with_capacity(dict.len());
        for (key, value) in dict.iter() {
            let inner = format!("{name}[{}]", key.repr()?.to_string_lossy());
            let key = if key.is_exact_instance_of::<PyString>() {
                Key::Str(text(&key, place, &format!("the key of {inner}"))?)
            } else if let (true, Ok(x)) = (key.is_exact_instance_of::<PyInt>(), key.extract::<i64>()) {
                Key::Int(x)
            } else {
                let name = format!("the key of {inner}");
                return Err(refuse(
                    py,
                    ErrorKind::Type,
                    place,
                    &name,
                    "a str or an int of 64 bits",
                    described(&key),
                    None,
                ));
            };
            items.push((key, to_tree(&value, place, &inner, depth + 1)?));
        }
        Ok(Tree::Dict(items))
    } else if let Ok(parameter) = object.cast::<ParameterBase>() {
        parameter.get().bring_home(py)?;
        tensor(parameter.get().host(py).as_any(), place, name).map(Tree::Tensor)
    } else {
        let numpy = py.import("numpy")?;
        let kind = object.get_type();
        if object.is_instance(&numpy.getattr("generic")?)? {
            tensor(object, place, name).map(Tree::Scalar)
        } else if kind.is(&numpy.getattr("ndarray")?) || kind.is(&numpy.getattr("memmap")?) {
            tensor(object, place, name).map(Tree::Tensor)
        } else {
            Err(refuse(py, ErrorKind::Type, place, name, ALLOWED, described(object), None))
        }
    }
}

fn array<'py>(py: Python<'py>, tensor: &TensorData) -> PyResult<Bound<'py, PyAny>> {
    if tensor.dtype == DataType::BFloat16 {
        // NumPy knows the name once the package that defines it is imported.
        py.import("ml_dtypes").map_err(|cause| {
            let sentence = "roptim.load: bfloat16 arrays must be read with the package ml_dtypes installed, got none";
            raise(py, &Error::plain(ErrorKind::File, sentence).with_source(cause))
        })?;
    }
    arrays::from_bytes(py, tensor.dtype.name(), &tensor.shape, &tensor.bytes)
}

/// A tree as Python values; arrays are copies.
pub(crate) fn from_tree<'py>(py: Python<'py>, tree: &Tree) -> PyResult<Bound<'py, PyAny>> {
    let all = |items: &[Tree]| items.iter().map(|x| from_tree(py, x)).collect::<PyResult<Vec<_>>>();
    Ok(match tree {
        Tree::None => py.None().into_bound(py),
        Tree::Bool(b) => PyBool::new(py, *b).to_owned().into_any(),
        Tree::Int(x) => x.into_pyobject(py)?.into_any(),
        Tree::UInt(x) => x.into_pyobject(py)?.into_any(),
        Tree::Float(x) => PyFloat::new(py, *x).into_any(),
        Tree::Str(text) => PyString::new(py, text).into_any(),
        Tree::List(items) => PyList::new(py, all(items)?)?.into_any(),
        Tree::Tuple(items) => PyTuple::new(py, all(items)?)?.into_any(),
        Tree::Dict(items) => {
            let dict = PyDict::new(py);
            for (key, value) in items {
                let value = from_tree(py, value)?;
                match key {
                    Key::Str(key) => dict.set_item(key, value)?,
                    Key::Int(key) => dict.set_item(key, value)?,
                }
            }
            dict.into_any()
        }
        // Indexing a 0-d array with () gives the NumPy scalar.
        Tree::Scalar(tensor) => array(py, tensor)?.get_item(PyTuple::empty(py))?,
        Tree::Tensor(tensor) => array(py, tensor)?,
    })
}

/// The same value, with its arrays closed to writing.
pub(crate) fn read_only(value: Bound<'_, PyAny>) -> PyResult<Bound<'_, PyAny>> {
    if let Ok(items) = value.cast::<PyList>() {
        items.iter().try_for_each(|item| read_only(item).map(drop))?;
    } else if value.hasattr("setflags")? {
        value.call_method1("setflags", (false,))?;
    }
    Ok(value)
}

/// Writes a tree of values to a file, completely or not at all.
#[pyfunction]
pub(crate) fn save(py: Python<'_>, object: &Bound<'_, PyAny>, path: &str) -> PyResult<()> {
    let tree = to_tree(object, "roptim.save", "obj", 0)?;
    py.detach(|| guarded("roptim.save", || checkpoint::save(path, &tree))).or_raise(py)
}

/// Reads what [`save`] wrote.
#[pyfunction]
pub(crate) fn load<'py>(py: Python<'py>, path: &str) -> PyResult<Bound<'py, PyAny>> {
    let tree = py.detach(|| guarded("roptim.load", || checkpoint::load(path))).or_raise(py)?;
    from_tree(py, &tree)
}

/// The bytes of the file that [`save`] would write.
#[pyfunction]
pub(crate) fn dumps<'py>(py: Python<'py>, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let tree = to_tree(object, "roptim", "obj", 0)?;
    let bytes = py.detach(|| guarded("roptim", || checkpoint::to_bytes(&tree))).or_raise(py)?;
    Ok(PyBytes::new(py, &bytes))
}

/// The tree in such bytes.
#[pyfunction]
pub(crate) fn loads<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    let tree = py.detach(|| guarded("roptim", || checkpoint::from_bytes(bytes))).or_raise(py)?;
    from_tree(py, &tree)
}
