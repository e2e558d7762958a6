//! Gradients as steps take them: an array, or the values of some rows.

use std::sync::Arc;

use numpy::{PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use roptim::error::shape_text;
use roptim::tensor::Rows;
use roptim::{Error, ErrorKind};

use crate::arrays::{Access, Context, as_array};
use crate::errors::{raise, refuse};

/// A gradient: dense, or what it is in the rows it touches.
pub(crate) struct Gradient<'py> {
    /// The numbers.
    pub(crate) array: Bound<'py, PyUntypedArray>,
    /// The rows they belong to, counted in real numbers.
    pub(crate) touched: Option<Arc<Rows>>,
}

/// The sparse gradient that an object is: a `SparseGrad`, or a scipy.sparse array. `None` for anything else.
pub(crate) fn of_rows<'py>(
    object: &Bound<'py, PyAny>,
    shape: &[usize],
    context: Context<'_>,
) -> PyResult<Option<Gradient<'py>>> {
    let py = object.py();
    let parts = py.import("roptim._sparse")?.call_method1("parts", (object,))?;
    if parts.is_none() {
        return Ok(None);
    }
    let (index, values, dense): (PyReadonlyArray1<'_, i64>, Bound<'_, PyAny>, Vec<usize>) = parts.extract()?;
    if dense != shape {
        let (want, got) = (format!("of shape {}", shape_text(shape)), shape_text(&dense));
        return Err(refuse(py, ErrorKind::Value, context.place, context.label, want, got, None));
    }
    let array = as_array(&values, Access::Read, context)?;
    let rows = index.as_array();
    let mut index = Vec::new();
    if index.try_reserve_exact(rows.len()).is_err() {
        let sentence = format!("roptim: {} bytes for the rows of a gradient could not be allocated", 8 * rows.len());
        return Err(raise(py, &Error::plain(ErrorKind::OutOfMemory, sentence)));
    }
    // A row that is none is one past all others.
    index.extend(rows.iter().map(|&row| usize::try_from(row).unwrap_or(usize::MAX)));
    let (per_row, rows) = (array.shape().get(1..).unwrap_or_default(), array.shape().first());
    let width: usize = per_row.iter().product();
    let elements: usize = shape.iter().product();
    let parts = if values.getattr("dtype")?.getattr("kind")?.eq("c")? { 2 } else { 1 };
    let touched = Some(index).filter(|index| Some(&index.len()) == rows).and_then(|index| {
        let total = elements.checked_div(width).unwrap_or(usize::MAX);
        Rows::new(index, width * parts, total)
    });
    let Some(touched) = touched else {
        let allowed = "sparse with one row of values for each of its rows";
        let got = format!("values of shape {}", shape_text(array.shape()));
        return Err(refuse(py, ErrorKind::Value, context.place, context.label, allowed, got, None));
    };
    Ok(Some(Gradient { array, touched: Some(Arc::new(touched)) }))
}
