//! Devices as Python sees them.

use roptim::gpu::DeviceRequest;

/// What `backend="gpu[:selector]"` asks for.
pub(crate) fn request(selector: &str, allow_software: bool) -> DeviceRequest {
    DeviceRequest {
        selector: (!selector.is_empty()).then(|| selector.to_owned()),
        allow_software,
        ..DeviceRequest::default()
    }
}
