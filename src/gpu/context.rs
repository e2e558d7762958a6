//! Adapters, devices and what can go wrong with them.
//!
//! Nothing happens before the first request. One instance per process lists the adapters once; a device
//! is opened once per adapter and shared by every executor, with the pipelines compiled on it. A forked
//! child cannot use what its parent opened, so everything remembers the process it belongs to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use pollster::block_on;
use wgpu::DeviceType;

use super::arena::ALIGN;
use super::pipeline::Pipeline;
use super::vector::VectorPipelines;
use crate::error::{Error, ErrorKind, Result};
use crate::real::Dtype;
use crate::shader::Module;

/// Which device an optimizer asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceRequest {
    /// An index of [`devices`], or a part of the name in any case. `None` for what `ROPTIM_ADAPTER` says,
    /// or the first device.
    pub selector: Option<String>,
    /// Whether an adapter that computes on the CPU will do; `ROPTIM_ALLOW_SOFTWARE=1` says yes too.
    pub allow_software: bool,
    /// Whether to keep to the limits that WebGPU guarantees, as `ROPTIM_GPU_MIN_LIMITS=1` does. For tests:
    /// results do not change.
    pub minimum_limits: bool,
    /// Whether to open a device that no other executor shares. For tests that break it.
    pub alone: bool,
}

/// One adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What [`DeviceRequest::selector`] may say.
    pub index: usize,
    /// The driver's name for it.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `other` or `software`.
    pub kind: &'static str,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: &'static str,
    /// Name and version of the driver.
    pub driver: String,
    /// PCI vendor.
    pub vendor: u32,
    /// Whether it computes on the CPU.
    pub software: bool,
    /// Bytes of the largest buffer.
    pub max_buffer_bytes: u64,
    /// Bytes that one binding may span: the largest window.
    pub max_binding_bytes: u64,
}

/// Every adapter, best first: discrete, integrated, virtual, other, software.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    Ok(System::get("roptim.devices")?.infos.clone())
}

/// A lock that survives a panic of another holder: what it guards is replaced whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value of the process that made it. A forked child gets an error, and leaks the value in place of
/// handing handles of its parent's driver back.
#[derive(Debug)]
pub(super) struct OfProcess<T> {
    value: Option<T>,
    process: u32,
}

impl<T> OfProcess<T> {
    pub(super) fn new(value: T) -> Self {
        Self { value: Some(value), process: std::process::id() }
    }

    pub(super) fn get(&self, place: &str) -> Result<&T> {
        let here = self.process == std::process::id();
        self.value.as_ref().filter(|_| here).ok_or_else(|| forked(place))
    }

    pub(super) fn get_mut(&mut self, place: &str) -> Result<&mut T> {
        let here = self.process == std::process::id();
        self.value.as_mut().filter(|_| here).ok_or_else(|| forked(place))
    }

    #[cfg(test)]
    pub(super) fn pretend_forked(&mut self) {
        self.process = self.process.wrapping_add(1);
    }
}

impl<T> Drop for OfProcess<T> {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            std::mem::forget(self.value.take());
        }
    }
}

fn forked(place: &str) -> Error {
    Error::plain(ErrorKind::Forked, format!("{place}: the GPU was opened before this process was forked"))
        .with_remedy("start child processes with \"spawn\", or use backend=\"cpu\" in them")
}

/// An adapter's index, and whether the limits are WebGPU's minimum.
type Key = (usize, bool);

/// The instance's adapters, best first, and the open devices.
struct System {
    adapters: Vec<wgpu::Adapter>,
    infos: Vec<DeviceInfo>,
    open: Mutex<Vec<(Key, Arc<Context>)>>,
}

impl System {
    /// Lists the adapters on the first call. The process that makes it owns the GPU for good.
    fn get(place: &str) -> Result<&'static Self> {
        static OWNER: AtomicU32 = AtomicU32::new(0);
        static SYSTEM: OnceLock<System> = OnceLock::new();
        let here = std::process::id();
        match OWNER.compare_exchange(0, here, Ordering::AcqRel, Ordering::Acquire) {
            Err(owner) if owner != here => Err(forked(place)),
            _ => Ok(SYSTEM.get_or_init(Self::list)),
        }
    }

    fn list() -> Self {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
        // Drivers may promise more than there is; what exceeds their own count of free memory is refused instead.
        descriptor.memory_budget_thresholds.for_resource_creation = Some(99);
        let instance = wgpu::Instance::new(descriptor);
        let mut adapters = block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
        adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
            DeviceType::DiscreteGpu => 0,
            DeviceType::IntegratedGpu => 1,
            DeviceType::VirtualGpu => 2,
            DeviceType::Other => 3,
            DeviceType::Cpu => 4,
        });
        let infos = adapters.iter().enumerate().map(|(index, adapter)| info(index, adapter)).collect();
        Self { adapters, infos, open: Mutex::default() }
    }

    /// Index of the adapter that fits the request.
    fn choose(&self, place: &str, selector: Option<&str>, allow_software: bool) -> Result<usize> {
        let list = |infos: &[&DeviceInfo]| {
            infos.iter().map(|i| format!("{}: {} ({})", i.index, i.name, i.kind)).collect::<Vec<_>>().join(", ")
        };
        let driver = "install a driver for Vulkan, Metal or Direct3D 12";
        if self.infos.is_empty() {
            return Err(Error::refuse(ErrorKind::NoAdapter, place, "backend", "\"cpu\" without a GPU", "\"gpu\"")
                .with_remedy(format!("no adapter was found: {driver}")));
        }
        let fits = |info: &DeviceInfo| match selector {
            None => true,
            Some(text) => match text.trim().parse::<usize>() {
                Ok(index) => info.index == index,
                Err(_) => info.name.to_lowercase().contains(&text.trim().to_lowercase()),
            },
        };
        let candidates: Vec<&DeviceInfo> = self.infos.iter().filter(|info| fits(info)).collect();
        if candidates.is_empty() {
            let allowed = format!("an index or a part of a name of {}", list(&self.infos.iter().collect::<Vec<_>>()));
            return Err(Error::refuse(ErrorKind::NoAdapter, place, "adapter", allowed, selector.unwrap_or_default()));
        }
        let found = candidates.iter().find(|info| allow_software || !info.software);
        found.map(|info| info.index).ok_or_else(|| {
            Error::refuse(ErrorKind::NoAdapter, place, "adapter", "a GPU", format!("only {}", list(&candidates)))
                .with_remedy(format!("{driver}, or pass allow_software=True to compute on the CPU through it"))
        })
    }
}

fn info(index: usize, adapter: &wgpu::Adapter) -> DeviceInfo {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let kind = match info.device_type {
        DeviceType::DiscreteGpu => "discrete",
        DeviceType::IntegratedGpu => "integrated",
        DeviceType::VirtualGpu => "virtual",
        DeviceType::Other => "other",
        DeviceType::Cpu => "software",
    };
    DeviceInfo {
        index,
        name: info.name,
        kind,
        backend: info.backend.to_str(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        vendor: info.vendor,
        software: info.device_type == DeviceType::Cpu,
        max_buffer_bytes: limits.max_buffer_size,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
    }
}

/// What the device reported outside of any call that could return it.
#[derive(Debug, Default)]
struct Reports {
    lost: Mutex<Option<String>>,
    error: Mutex<Option<Error>>,
}

/// An open device.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) info: DeviceInfo,
    /// Whether buffers that the device computes with may be mapped: its memory is the host's.
    pub(super) shares_memory: bool,
    /// Whether its limits are those that WebGPU guarantees.
    minimum: bool,
    /// Held while buffers that the device computes with are mapped, and while work is handed to it: a buffer that
    /// another thread maps cannot be in that.
    mapping: Mutex<()>,
    reports: Arc<Reports>,
    pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
    vector_pipelines: Mutex<Option<Arc<VectorPipelines>>>,
}

impl Context {
    /// The shared device that fits the request.
    pub(super) fn shared(place: &str, request: &DeviceRequest) -> Result<Arc<Self>> {
        let system = System::get(place)?;
        let (index, minimum) = Self::resolve(system, place, request)?;
        if request.alone {
            return Self::open(system, place, index, minimum);
        }
        let mut open = lock(&system.open);
        open.retain(|(_, context)| lock(&context.reports.lost).is_none());
        if let Some((_, context)) = open.iter().find(|(key, _)| *key == (index, minimum)) {
            return Ok(context.clone());
        }
        let context = Self::open(system, place, index, minimum)?;
        open.push(((index, minimum), context.clone()));
        Ok(context)
    }

    fn resolve(system: &System, place: &str, request: &DeviceRequest) -> Result<Key> {
        let set = |name| std::env::var(name).is_ok_and(|value| value.trim() == "1");
        let from_environment = std::env::var("ROPTIM_ADAPTER").ok().filter(|value| !value.trim().is_empty());
        let selector = request.selector.clone().or(from_environment);
        let allow_software = request.allow_software || set("ROPTIM_ALLOW_SOFTWARE");
        let index = system.choose(place, selector.as_deref(), allow_software)?;
        Ok((index, request.minimum_limits || set("ROPTIM_GPU_MIN_LIMITS")))
    }

    fn open(system: &System, place: &str, index: usize, minimum: bool) -> Result<Arc<Self>> {
        let (adapter, info) = (&system.adapters[index], system.infos[index].clone());
        let mut limits = wgpu::Limits::default();
        // Of discrete memory only a window is mappable, at the price of slow access.
        let mappable = wgpu::Features::MAPPABLE_PRIMARY_BUFFERS;
        let shares_memory =
            !minimum && matches!(info.kind, "software" | "integrated") && adapter.features().contains(mappable);
        if !minimum {
            let offered = adapter.limits();
            limits.max_buffer_size = limits.max_buffer_size.max(offered.max_buffer_size);
            limits.max_storage_buffer_binding_size =
                limits.max_storage_buffer_binding_size.max(offered.max_storage_buffer_binding_size);
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("roptim"),
            required_features: if shares_memory { mappable } else { wgpu::Features::empty() },
            required_limits: limits,
            ..Default::default()
        };
        let (device, queue) = block_on(adapter.request_device(&descriptor)).map_err(|e| {
            Error::plain(ErrorKind::Device, format!("{place}: {} could not be opened: {e}", info.name)).with_source(e)
        })?;
        let reports = Arc::new(Reports::default());
        let on_error = reports.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            lock(&on_error.error).get_or_insert_with(|| failure("roptim: the GPU", error));
        }));
        let on_loss = reports.clone();
        device.set_device_lost_callback(move |reason, message| {
            lock(&on_loss.lost).get_or_insert_with(|| format!("{message} ({reason:?})"));
        });
        Ok(Arc::new(Self {
            device,
            queue,
            info,
            shares_memory,
            minimum,
            mapping: Mutex::default(),
            reports,
            pipelines: Mutex::default(),
            vector_pipelines: Mutex::default(),
        }))
    }

    /// The error of a device that is gone, or one that it reported since the last look.
    pub(super) fn check(&self, place: &str) -> Result<()> {
        if let Some(reason) = &*lock(&self.reports.lost) {
            let reason = reason.trim();
            return Err(Error::plain(ErrorKind::DeviceLost, format!("{place}: {} was lost: {reason}", self.info.name))
                .with_remedy("restore parameters and state from one checkpoint"));
        }
        lock(&self.reports.error).take().map_or(Ok(()), Err)
    }

    /// For tests: loses the device.
    pub(super) fn force_loss(&self) {
        self.device.destroy();
        // The word of the loss comes with the next poll.
        let _ = self.device.poll(wgpu::PollType::wait_indefinitely());
    }

    /// Runs device calls and returns the first error they raise.
    pub(super) fn scoped<T>(&self, place: &str, calls: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check(place)?;
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let out = calls();
        // The innermost scope is popped first.
        let [validation, internal, memory] =
            [block_on(validation.pop()), block_on(internal.pop()), block_on(memory.pop())];
        self.check(place)?;
        // Where memory was missing, what was to be done with it is not valid, either.
        match memory.or(internal).or(validation) {
            Some(error) => Err(failure(place, error)),
            None => out,
        }
    }

    /// Lanes of a workgroup: small ones suit software adapters; GPUs hide memory latency with larger ones, which are
    /// also those of a test with the minimum limits.
    pub(super) fn workgroup(&self) -> u32 {
        if self.info.software && !self.minimum { 64 } else { 256 }
    }

    /// Elements of the longest window: float32 numbers that one binding may span.
    pub(super) fn window_elements(&self) -> usize {
        let limits = self.device.limits();
        // Some drivers offer more than shaders can count.
        let bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(i32::MAX as u64);
        (usize::try_from(bytes).unwrap_or(usize::MAX / 8) / 4 / ALIGN * ALIGN).max(ALIGN)
    }

    /// Refuses to make buffers of so many bytes where they exceed what is free. A software adapter promises any
    /// number, and the host would run out later; a GPU's driver knows.
    pub(super) fn refuse_beyond_memory(&self, place: &str, bytes: u64) -> Result<()> {
        match free_host_memory().filter(|&free| self.info.software && bytes > free) {
            None => Ok(()),
            Some(free) => Err(Error::plain(
                ErrorKind::OutOfMemory,
                format!("{place}: {} is out of memory: {bytes} bytes are needed, {free} are free", self.info.name),
            )),
        }
    }

    /// The right to map buffers that the device computes with, or to hand work to it.
    pub(super) fn mapping(&self) -> MutexGuard<'_, ()> {
        lock(&self.mapping)
    }

    /// A buffer of zeros.
    pub(super) fn buffer(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages, mapped: bool) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: bytes,
            usage,
            mapped_at_creation: mapped,
        })
    }

    /// The compiled module of this name.
    pub(super) fn pipeline(&self, place: &str, name: &str, module: impl FnOnce() -> Module) -> Result<Arc<Pipeline>> {
        if let Some(found) = lock(&self.pipelines).get(name) {
            return Ok(found.clone());
        }
        let made = self.scoped(place, || Ok(Arc::new(Pipeline::new(self, name, &module()))))?;
        Ok(lock(&self.pipelines).entry(name.to_owned()).or_insert(made).clone())
    }

    /// The compiled operations on vectors.
    pub(super) fn vector_pipelines(&self, place: &str) -> Result<Arc<VectorPipelines>> {
        if let Some(found) = &*lock(&self.vector_pipelines) {
            return Ok(found.clone());
        }
        let made = self.scoped(place, || Ok(Arc::new(VectorPipelines::new(self))))?;
        Ok(lock(&self.vector_pipelines).get_or_insert(made).clone())
    }
}

/// Refuses what has no form on a GPU.
pub(super) fn refuse_wide(place: &str, label: impl Fn() -> String, dtype: Dtype) -> Result<()> {
    if matches!(dtype.part(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Ok(());
    }
    let allowed = "float32, float16, bfloat16 or complex64 on the GPU";
    Err(Error::refuse(ErrorKind::Type, place, label(), allowed, dtype)
        .with_remedy(format!("use backend=\"cpu\" for {dtype}")))
}

/// Bytes of the host's memory that are free, where the system tells.
fn free_host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A device's error in our form.
fn failure(place: &str, error: wgpu::Error) -> Error {
    match error {
        wgpu::Error::OutOfMemory { source } => {
            Error::plain(ErrorKind::OutOfMemory, format!("{place}: the GPU is out of memory")).with_source(source)
        }
        other => Error::plain(ErrorKind::Device, format!("{place}: the GPU refused an operation: {other}"))
            .with_source(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(index: usize, name: &str, kind: &'static str) -> DeviceInfo {
        DeviceInfo {
            index,
            name: name.into(),
            kind,
            backend: "vulkan",
            driver: String::new(),
            vendor: 0,
            software: kind == "software",
            max_buffer_bytes: 0,
            max_binding_bytes: 0,
        }
    }

    fn system(infos: Vec<DeviceInfo>) -> System {
        System { adapters: Vec::new(), infos, open: Mutex::default() }
    }

    #[test]
    fn choice_and_its_refusals() {
        let both = system(vec![adapter(0, "Big GPU", "discrete"), adapter(1, "llvmpipe", "software")]);
        assert_eq!(both.choose("AdamW", None, false).unwrap(), 0);
        assert_eq!(both.choose("AdamW", Some("LLVM"), true).unwrap(), 1);
        assert_eq!(both.choose("AdamW", Some("1"), true).unwrap(), 1);
        let refused = |system: &System, selector, software| {
            let error = system.choose("AdamW", selector, software).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoAdapter);
            error.to_string()
        };
        assert_eq!(
            refused(&both, Some("radeon"), true),
            "AdamW: adapter must be an index or a part of a name of 0: Big GPU (discrete), 1: llvmpipe (software), \
             got radeon"
        );
        assert_eq!(
            refused(&both, Some("llvm"), false),
            "AdamW: adapter must be a GPU, got only 1: llvmpipe (software); install a driver for Vulkan, Metal or \
             Direct3D 12, or pass allow_software=True to compute on the CPU through it"
        );
        assert_eq!(
            refused(&system(Vec::new()), None, true),
            "AdamW: backend must be \"cpu\" without a GPU, got \"gpu\"; no adapter was found: install a driver for \
             Vulkan, Metal or Direct3D 12"
        );
    }

    #[test]
    fn a_forked_child_is_refused_and_leaks() {
        struct NotDropped;
        impl Drop for NotDropped {
            fn drop(&mut self) {
                panic!("a child must not free what its parent opened");
            }
        }
        let mut value = OfProcess::new(NotDropped);
        assert!(value.get("Adam").is_ok());
        value.pretend_forked();
        let error = value.get("Adam").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Forked);
        assert_eq!(
            error.to_string(),
            "Adam: the GPU was opened before this process was forked; start child processes with \"spawn\", or use \
             backend=\"cpu\" in them"
        );
    }
}
