//! Devices as Python sees them.

use pyo3::prelude::*;
use roptim::cpu::{Isa, Threads};
use roptim::gpu::{self, DeviceRequest};

use crate::errors::{OrRaise, guarded};

/// What `backend="gpu[:selector]"` asks for.
pub(crate) fn request(selector: &str, allow_software: bool) -> DeviceRequest {
    DeviceRequest {
        selector: (!selector.is_empty()).then(|| selector.to_owned()),
        allow_software,
        ..DeviceRequest::default()
    }
}

type Row = (String, String, String, String, bool);

/// Every device: what chooses it, name, kind, driver, and whether it is a software adapter.
#[pyfunction]
pub(crate) fn devices(py: Python<'_>) -> PyResult<Vec<Row>> {
    let threads = format!("{} threads, {}", Threads::new(None).count(), Isa::detect().name());
    let mut rows = vec![("cpu".to_owned(), "cpu".to_owned(), "cpu".to_owned(), threads, false)];
    for device in py.detach(|| guarded("roptim.devices", gpu::devices)).or_raise(py)? {
        let chosen_by = format!("gpu:{}", device.index);
        let kind = if device.software { "software".to_owned() } else { device.kind.to_string() };
        rows.push((chosen_by, device.name.clone(), kind, device.driver.clone(), device.software));
    }
    Ok(rows)
}
