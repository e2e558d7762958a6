//! Trees of Python values to files and back. The format is the engine's; here only types.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use roptim::checkpoint::{self, DataType, Key, MAX_DEPTH, OsDisk, TensorData, Tree};
use roptim::{Error, ErrorKind};

use crate::arrays::{self, Taking};
use crate::errors::{OrRaise, guarded, raise, refuse};
use crate::parameter::ParameterBase;
use crate::values::text;

const ALLOWED: &str =
    "None, bool, int, float, str, list, tuple, dict, a NumPy scalar, a numeric array or an object with state_dict";

/// Of an int, as many as the format's decimal digits hold for certain.
const MAX_INT_BITS: u64 = 4096;

fn described(object: &Bound<'_, PyAny>) -> String {
    let name = object.get_type().fully_qualified_name();
    format!("an object of type {}", name.map_or_else(|_| "unknown".into(), |n| n.to_string()))
}

fn tensor(object: &Bound<'_, PyAny>, place: &str, name: &str, taking: Taking) -> PyResult<TensorData> {
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
    TensorData::new(data_type, shape, arrays::bytes(&native, taking)?).or_raise(py)
}

/// A Python value as a tree. `place` starts messages, which call the value `name`.
pub(crate) fn to_tree(object: &Bound<'_, PyAny>, place: &str, name: &str, taking: Taking) -> PyResult<Tree> {
    grown(object, place, name, taking, 0)
}

fn grown(object: &Bound<'_, PyAny>, place: &str, name: &str, taking: Taking, depth: usize) -> PyResult<Tree> {
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
            _ if object.call_method0("bit_length")?.extract::<u64>()? <= MAX_INT_BITS => {
                Ok(Tree::BigInt(object.str()?.extract()?))
            }
            _ => {
                let allowed = format!("an int of at most {MAX_INT_BITS} bits");
                Err(refuse(py, ErrorKind::Value, place, name, allowed, "a larger one", None))
            }
        }
    } else if let Ok(x) = object.cast_exact::<PyFloat>() {
        Ok(Tree::Float(x.value()))
    } else if object.is_exact_instance_of::<PyString>() {
        text(object, place, name).map(Tree::Str)
    } else if let Ok(list) = object.cast_exact::<PyList>() {
        let items = list.iter().enumerate();
        items
            .map(|(i, x)| grown(&x, place, &format!("{name}[{i}]"), taking, depth + 1))
            .collect::<PyResult<_>>()
            .map(Tree::List)
    } else if let Ok(tuple) = object.cast_exact::<PyTuple>() {
        let items = tuple.iter().enumerate();
        items
            .map(|(i, x)| grown(&x, place, &format!("{name}[{i}]"), taking, depth + 1))
            .collect::<PyResult<_>>()
            .map(Tree::Tuple)
    } else if let Ok(dict) = object.cast_exact::<PyDict>() {
        let mut items = Vec::with_capacity(dict.len());
        // A copy of what it holds now: `state_dict` of an object in it may change it.
        for item in dict.items().iter() {
            let (key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
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
            items.push((key, grown(&value, place, &inner, taking, depth + 1)?));
        }
        Ok(Tree::Dict(items))
    } else if let Ok(parameter) = object.cast::<ParameterBase>() {
        parameter.get().bring_home(py)?;
        tensor(parameter.get().host(py).as_any(), place, name, taking).map(Tree::Tensor)
    } else {
        let numpy = py.import("numpy")?;
        let kind = object.get_type();
        if object.is_instance(&numpy.getattr("generic")?)? {
            tensor(object, place, name, taking).map(Tree::Scalar)
        } else if kind.is(&numpy.getattr("ndarray")?) || kind.is(&numpy.getattr("memmap")?) {
            tensor(object, place, name, taking).map(Tree::Tensor)
        } else if let Some((state, suffix)) = state_of(object)? {
            grown(&state, place, &format!("{name}{suffix}"), taking, depth + 1)
        } else {
            Err(refuse(py, ErrorKind::Type, place, name, ALLOWED, described(object), None))
        }
    }
}

/// What an object that keeps a state is saved as, and how a place in it is written.
fn state_of<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<(Bound<'py, PyAny>, String)>> {
    object.py().import("roptim._files")?.call_method1("state_of", (object,))?.extract()
}

fn array(py: Python<'_>, tensor: TensorData) -> PyResult<Bound<'_, PyAny>> {
    if tensor.dtype == DataType::BFloat16 {
        // NumPy knows the name once the package that defines it is imported.
        py.import("ml_dtypes").map_err(|cause| {
            let sentence = "roptim.load: bfloat16 arrays must be read with the package ml_dtypes installed, got none";
            raise(py, &Error::plain(ErrorKind::File, sentence).with_source(cause))
        })?;
    }
    arrays::of_bytes(py, tensor.dtype.name(), &tensor.shape, tensor.bytes.into_vec().or_raise(py)?)
}

/// A tree as Python values; large arrays take over its memory.
pub(crate) fn from_tree(py: Python<'_>, tree: Tree) -> PyResult<Bound<'_, PyAny>> {
    let all = |items: Vec<Tree>| items.into_iter().map(|x| from_tree(py, x)).collect::<PyResult<Vec<_>>>();
    Ok(match tree {
        Tree::None => py.None().into_bound(py),
        Tree::Bool(b) => PyBool::new(py, b).to_owned().into_any(),
        Tree::Int(x) => x.into_pyobject(py)?.into_any(),
        Tree::UInt(x) => x.into_pyobject(py)?.into_any(),
        Tree::BigInt(digits) => py.get_type::<PyInt>().call1((digits,))?,
        Tree::Float(x) => PyFloat::new(py, x).into_any(),
        Tree::Str(text) => PyString::new(py, &text).into_any(),
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

/// Calls a Python function with the bytes done and the bytes in all, and keeps what it raises.
pub(crate) struct Reporter {
    progress: Option<Py<PyAny>>,
    raised: Option<PyErr>,
}

impl Reporter {
    pub(crate) fn new(progress: Option<Py<PyAny>>) -> Self {
        Self { progress, raised: None }
    }

    /// Ends the work where the function raises, or a signal came in.
    pub(crate) fn report(&mut self, done: u64, total: u64) -> roptim::Result<()> {
        let outcome = Python::attach(|py| {
            py.check_signals()?;
            self.progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (done, total)).map(drop))
        });
        outcome.map_err(|raised| {
            self.raised = Some(raised);
            Error::plain(ErrorKind::Internal, "the report of progress raised an exception")
        })
    }

    /// The result, or what the function raised.
    pub(crate) fn outcome<T>(self, py: Python<'_>, result: roptim::Result<T>) -> PyResult<T> {
        match self.raised {
            Some(raised) => Err(raised),
            None => result.or_raise(py),
        }
    }
}

/// Writes a tree of values to a file, completely or not at all.
#[pyfunction]
pub(crate) fn save(
    py: Python<'_>,
    object: &Bound<'_, PyAny>,
    path: PathBuf,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let tree = to_tree(object, "roptim.save", "obj", Taking::Lent)?;
    let mut reporter = Reporter::new(progress);
    let saved = py.detach(|| {
        guarded("roptim.save", || {
            checkpoint::save_to(&OsDisk, &path, &tree, &mut |done, total| reporter.report(done, total))
        })
    });
    reporter.outcome(py, saved)
}

/// Reads what [`save`] wrote.
#[pyfunction]
pub(crate) fn load(py: Python<'_>, path: PathBuf, progress: Option<Py<PyAny>>) -> PyResult<Bound<'_, PyAny>> {
    let mut reporter = Reporter::new(progress);
    let tree = py.detach(|| {
        guarded("roptim.load", || {
            checkpoint::load_from(&OsDisk, &path, &mut |done, total| reporter.report(done, total))
        })
    });
    from_tree(py, reporter.outcome(py, tree)?)
}

/// The bytes of the file that [`save`] would write.
#[pyfunction]
pub(crate) fn dumps<'py>(py: Python<'py>, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let tree = to_tree(object, "roptim", "obj", Taking::Lent)?;
    let bytes = py.detach(|| guarded("roptim", || checkpoint::to_bytes(&tree))).or_raise(py)?;
    Ok(PyBytes::new(py, &bytes))
}

/// The tree in such bytes.
#[pyfunction]
pub(crate) fn loads<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyAny>> {
    let tree = py.detach(|| guarded("roptim", || checkpoint::from_bytes(bytes))).or_raise(py)?;
    from_tree(py, tree)
}

/// A tree of values as JSON text, with its exact types.
#[pyfunction]
pub(crate) fn to_json(py: Python<'_>, object: &Bound<'_, PyAny>, place: &str) -> PyResult<String> {
    let tree = to_tree(object, place, "obj", Taking::Lent)?;
    let text = || serde_json::to_string(&tree).map_err(|e| Error::plain(ErrorKind::Value, format!("{place}: {e}")));
    py.detach(|| guarded(place, text)).or_raise(py)
}

/// The tree of such a text.
#[pyfunction]
pub(crate) fn from_json<'py>(py: Python<'py>, text: &str, place: &str) -> PyResult<Bound<'py, PyAny>> {
    let read = || {
        serde_json::from_str::<Tree>(text)
            .map_err(|e| Error::refuse(ErrorKind::File, place, "the text", "JSON as to_json writes it", e))
    };
    from_tree(py, py.detach(|| guarded(place, read)).or_raise(py)?)
}

/// Writes bytes of another format to a file, completely or not at all, as [`save`] does.
#[pyfunction]
pub(crate) fn write_file(py: Python<'_>, path: PathBuf, bytes: &[u8]) -> PyResult<()> {
    py.detach(|| guarded("roptim", || checkpoint::write_file(&path, bytes))).or_raise(py)
}
