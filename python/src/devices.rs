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

type Row = (String, String, String, String, bool, &'static str, u64, u64);

/// Every device: what chooses it, name, kind, driver, whether it is a software adapter, its interface, and the bytes
/// of its largest buffer and binding.
#[pyfunction]
pub(crate) fn devices(py: Python<'_>) -> PyResult<Vec<Row>> {
    let threads = format!("{} threads, {}", Threads::new(None).count(), Isa::detect().name());
    let mut rows = vec![("cpu".to_owned(), "cpu".to_owned(), "cpu".to_owned(), threads, false, "", 0, 0)];
    for device in py.detach(|| guarded("roptim.devices", gpu::devices)).or_raise(py)? {
        let chosen_by = format!("gpu:{}", device.index);
        let kind = if device.software { "software".to_owned() } else { device.kind.to_string() };
        let limits = (device.max_buffer_bytes, device.max_binding_bytes);
        rows.push((chosen_by, device.name, kind, device.driver, device.software, device.backend, limits.0, limits.1));
    }
    Ok(rows)
}
