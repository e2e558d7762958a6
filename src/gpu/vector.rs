//! Vectors on the device, for methods that evaluate the loss several times in a step.
//!
//! ```text
//! new       host → buffers                        submitted
//! x + a·y   into other buffers                    recorded, one dispatch per window
//! reduce    one result per block → host → number  waits, once for several numbers
//! to_host   buffers → host                        waits
//! ```
//!
//! A vector is cut into windows no longer than one binding may be; each is a buffer. Buffers of vectors that are
//! gone are used again, also by operations that follow in what is recorded: the device keeps the order. An operation
//! never writes what it reads, so vectors can share buffers. What is recorded goes to the device with the next vector
//! that the host brings, or the next number or vector that it wants.
//!
//! Blocks, and the tree that joins them, are those of the CPU's sums; within a block the terms have about 48 bits and
//! another order. Elementwise operations are the CPU's.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::context::{Context, DeviceInfo, DeviceRequest, OfProcess, lock, refuse_wide};
use super::staging::{BLOCK_BYTES, Download, Part, Sink, Source, Staging, Upload, submit};
use crate::closure::vector::{Reduction, Vector};
use crate::error::{Error, ErrorKind, Result};
use crate::linear::{SUM_BLOCK, join_tree, tree};
use crate::real::Real;
use crate::shader::{OPERATION_WORDS, VECTOR_ENTRY_POINTS, vector_module};
use crate::store::ParamInfo;
use crate::tensor::TensorRef;

/// Operations that are recorded before they go to the device.
const MOST_RECORDED: usize = 256;
/// What WebGPU guarantees as the distance of uniforms in one buffer.
const UNIFORM_BYTES: usize = 256;
/// Bytes of a block's result.
const RESULT_BYTES: usize = 16;
/// Bits of a sum's fourth word, as in vector.wgsl.
const HAS_NAN: u32 = 1;
const HAS_PLUS_INFINITY: u32 = 2;
const HAS_MINUS_INFINITY: u32 = 4;

/// The operations compiled for a device.
#[derive(Debug)]
pub(super) struct VectorPipelines {
    layout: wgpu::BindGroupLayout,
    add_scaled: wgpu::ComputePipeline,
    scale: wgpu::ComputePipeline,
    sum: wgpu::ComputePipeline,
    largest: wgpu::ComputePipeline,
}

impl VectorPipelines {
    /// Compiles; errors go to the scope around the call.
    pub(super) fn new(context: &Context) -> Self {
        let device = &context.device;
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("vector"),
            source: wgpu::ShaderSource::Wgsl(vector_module().into()),
        });
        let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
        let types = [wgpu::BufferBindingType::Uniform, storage(false), storage(true), storage(true)];
        let entry = |(binding, ty)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let entries: Vec<_> = (0..).zip(types).map(entry).collect();
        let layout = device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some("vector"), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some("vector"),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        // As for the kernels of rules.
        let workgroup = f64::from(context.workgroup());
        let compile = |entry_point: &'static str| {
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(entry_point),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some(entry_point),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &[("WORKGROUP", workgroup)],
                    // What is read of workgroup memory was written.
                    zero_initialize_workgroup_memory: false,
                },
                cache: None,
            })
        };
        let [add_scaled, scale, sum, largest] = VECTOR_ENTRY_POINTS.map(compile);
        Self { layout, add_scaled, scale, sum, largest }
    }
}

/// A GPU for the vectors of one optimizer.
#[derive(Debug)]
pub struct VectorSpace {
    place: &'static str,
    request: DeviceRequest,
    context: Arc<OfProcess<Arc<Context>>>,
    /// Elements of a buffer, whole blocks.
    window: usize,
}

impl VectorSpace {
    /// Opens the device that the request asks for; `place` is the optimizer's name in messages.
    pub fn new(place: &'static str, request: &DeviceRequest) -> Result<Self> {
        Ok(Self::on(Context::shared(place, request)?, place, request.clone()))
    }

    /// Opens a device again where it was lost.
    pub(crate) fn recover(&mut self) -> Result<()> {
        let lost = self.context.get(self.place)?.check(self.place);
        if matches!(lost, Err(error) if error.kind() == ErrorKind::DeviceLost) {
            let window = self.window;
            *self = Self::new(self.place, &self.request)?;
            self.force(window);
        }
        Ok(())
    }

    /// For tests: loses the device, as a driver's reset would.
    pub(crate) fn force_loss(&self) {
        if let Ok(context) = self.context.get(self.place) {
            context.force_loss();
        }
    }

    fn on(context: Arc<Context>, place: &'static str, request: DeviceRequest) -> Self {
        let limits = context.device.limits();
        let blocks = context.window_elements() / SUM_BLOCK;
        // A workgroup does a block, and one axis of them is enough.
        let window = blocks.min(limits.max_compute_workgroups_per_dimension as usize) * SUM_BLOCK;
        Self { place, request, context: Arc::new(OfProcess::new(context)), window }
    }

    /// The device.
    pub fn device(&self) -> Result<&DeviceInfo> {
        Ok(&self.context.get(self.place)?.info)
    }

    /// The device's name, for people.
    pub fn device_name(&self) -> &str {
        self.device().map_or("a GPU of the parent process", |info| &info.name)
    }

    /// For tests: buffers of about so many elements, of whole blocks. Works until parameters are added.
    pub fn force(&mut self, window: usize) {
        self.window = self.window.min(window.next_multiple_of(SUM_BLOCK).max(SUM_BLOCK));
    }

    /// Refuses parameters whose vector cannot be there; `known` are those before.
    pub fn accept(&self, params: &[ParamInfo], known: usize) -> Result<()> {
        self.context.get(self.place)?;
        params
            .iter()
            .enumerate()
            .try_for_each(|(i, info)| refuse_wide(self.place, || info.label(known + i), info.dtype))
    }

    /// A place for the vectors of one state.
    pub fn home(&self) -> VectorHome {
        VectorHome(Arc::new(Home {
            place: self.place,
            context: self.context.clone(),
            window: self.window,
            recorder: OfProcess::new(Mutex::new(Recorder::new(4 * self.window))),
            spare: OfProcess::new(Mutex::default()),
            failure: Mutex::default(),
        }))
    }
}

/// Where vectors of one length are made.
#[derive(Debug, Clone)]
pub struct VectorHome(Arc<Home>);

#[derive(Debug)]
struct Home {
    place: &'static str,
    context: Arc<OfProcess<Arc<Context>>>,
    window: usize,
    recorder: OfProcess<Mutex<Recorder>>,
    /// Buffers that no vector has, by their bytes.
    spare: OfProcess<Mutex<HashMap<u64, Vec<wgpu::Buffer>>>>,
    /// The first error of operations that do not return one.
    failure: Mutex<Option<Error>>,
}

/// What goes to the device next.
#[derive(Debug)]
struct Recorder {
    staging: Staging,
    encoder: Option<wgpu::CommandEncoder>,
    /// Scalars of the recorded operations.
    operations: Vec<u8>,
    /// The same on the device.
    uniforms: Option<wgpu::Buffer>,
    /// Results of blocks.
    results: Option<wgpu::Buffer>,
}

/// The scalars of one dispatch: the struct `Operation` of vector.wgsl.
#[derive(Debug, Clone, Copy, Default)]
struct Operation {
    factor: f32,
    elements: [u32; 2],
    result: u32,
    is_sum_abs: bool,
}

impl Operation {
    fn words(self) -> [u32; OPERATION_WORDS] {
        let [start, end] = self.elements;
        [self.factor.to_bits(), start, end, self.result, u32::from(self.is_sum_abs), 0]
    }

    /// Workgroups that it takes.
    fn blocks(self) -> u32 {
        self.elements[1].div_ceil(SUM_BLOCK as u32)
    }
}

impl Recorder {
    fn new(window_bytes: usize) -> Self {
        let staging = Staging::new(BLOCK_BYTES.min(window_bytes));
        Self { staging, encoder: None, operations: Vec::new(), uniforms: None, results: None }
    }

    fn record(
        &mut self,
        context: &Context,
        place: &str,
        (pipelines, pipeline): (&VectorPipelines, &wgpu::ComputePipeline),
        operation: Operation,
        buffers: [&wgpu::Buffer; 3],
    ) -> Result<()> {
        if self.operations.len() >= MOST_RECORDED * UNIFORM_BYTES {
            self.flush(context, place)?;
        }
        let uniforms = match self.uniforms.take() {
            Some(uniforms) => uniforms,
            None => {
                let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
                let bytes = (MOST_RECORDED * UNIFORM_BYTES) as u64;
                context.scoped(place, || Ok(context.buffer("operations", bytes, usage, false)))?
            }
        };
        let offset = self.operations.len();
        self.operations.extend(operation.words().iter().flat_map(|word| word.to_le_bytes()));
        self.operations.resize(offset + UNIFORM_BYTES, 0);
        let scalars = wgpu::BufferBinding {
            buffer: &uniforms,
            offset: offset as u64,
            size: wgpu::BufferSize::new(4 * OPERATION_WORDS as u64),
        };
        let resources = [wgpu::BindingResource::Buffer(scalars)]
            .into_iter()
            .chain(buffers.into_iter().map(wgpu::Buffer::as_entire_binding));
        let entry = |(binding, resource)| wgpu::BindGroupEntry { binding, resource };
        let bind_group = context.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("vector"),
            layout: &pipelines.layout,
            entries: &(0..).zip(resources).map(entry).collect::<Vec<_>>(),
        });
        let mut pass = self.encoder(context).begin_compute_pass(&Default::default());
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &bind_group, &[]);
        pass.dispatch_workgroups(operation.blocks(), 1, 1);
        drop(pass);
        self.uniforms = Some(uniforms);
        Ok(())
    }

    fn encoder(&mut self, context: &Context) -> &mut wgpu::CommandEncoder {
        self.encoder.get_or_insert_with(|| context.device.create_command_encoder(&Default::default()))
    }

    /// What was recorded, with its scalars on the way to the device.
    fn take(&mut self, context: &Context) -> wgpu::CommandEncoder {
        if let Some(uniforms) = self.uniforms.as_ref().filter(|_| !self.operations.is_empty()) {
            context.queue.write_buffer(uniforms, 0, &self.operations);
            self.operations.clear();
        }
        self.encoder.take().unwrap_or_else(|| context.device.create_command_encoder(&Default::default()))
    }

    fn flush(&mut self, context: &Context, place: &str) -> Result<()> {
        if self.encoder.is_some() {
            let encoder = self.take(context);
            submit(context, place, encoder)?;
        }
        Ok(())
    }

    /// The bytes at the start of a buffer, after all that was recorded.
    fn read(&mut self, context: &Context, place: &str, parts: Vec<Download<'_>>) -> Result<()> {
        let encoder = self.take(context);
        self.staging.download(context, place, None, encoder, parts).map(|_| ())
    }
}

impl Home {
    /// Elements of each window of a vector.
    fn windows(&self, len: usize) -> impl Iterator<Item = Range<usize>> {
        let window = self.window;
        (0..len).step_by(window).map(move |start| start..len.min(start + window))
    }

    /// Works with device and recorder. Where the device is lost, that is the error, whatever came of it.
    fn work<T>(&self, work: impl FnOnce(&Context, &mut Recorder) -> Result<T>) -> Result<T> {
        let context = self.context.get(self.place)?;
        context.check(self.place)?;
        let outcome = work(context, &mut lock(self.recorder.get(self.place)?));
        outcome.map_err(|error| context.check(self.place).err().unwrap_or(error))
    }

    /// A vector of any elements.
    fn vector(self: &Arc<Self>, context: &Context, len: usize) -> Result<DeviceVector> {
        let mut buffers = Vec::new();
        for window in self.windows(len) {
            let bytes = 4 * window.len().next_multiple_of(4) as u64;
            let spare = lock(self.spare.get(self.place)?).get_mut(&bytes).and_then(Vec::pop);
            buffers.push(match spare {
                Some(buffer) => buffer,
                None => {
                    use wgpu::BufferUsages as Usage;
                    let usage = Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST;
                    context.scoped(self.place, || Ok(context.buffer("vector", bytes, usage, false)))?
                }
            });
        }
        Ok(DeviceVector(Some(Arc::new(Body { home: self.clone(), len, buffers: OfProcess::new(buffers) }))))
    }

    /// A vector that an operation could not make: the error is kept.
    fn broken(self: &Arc<Self>, len: usize, error: Option<Error>) -> DeviceVector {
        if let Some(error) = error {
            lock(&self.failure).get_or_insert(error);
        }
        DeviceVector(Some(Arc::new(Body { home: self.clone(), len, buffers: OfProcess::new(Vec::new()) })))
    }

    fn has_failed(&self) -> bool {
        lock(&self.failure).is_some()
    }

    fn upload(self: &Arc<Self>, x: &[f32]) -> Result<DeviceVector> {
        self.work(|context, recorder| {
            let place = self.place;
            let vector = self.vector(context, x.len())?;
            let tensor = TensorRef::from(x);
            recorder.flush(context, place)?;
            let longest = recorder.staging.longest();
            let mut uploads = Vec::new();
            for (window, target) in self.windows(x.len()).zip(vector.buffers()?) {
                for at in (0..window.len()).step_by(longest) {
                    let (start, len) = (window.start + at, longest.min(window.len() - at));
                    // SAFETY: the source is a slice of f32, and the windows lie within it.
                    let source = Source::Array(unsafe { Part::new(&tensor.raw, start, len) });
                    uploads.push(Upload { target, offset: 4 * at as u64, bytes: 4 * len.next_multiple_of(4), source });
                }
            }
            let encoder = context.device.create_command_encoder(&Default::default());
            let encoder = recorder.staging.upload(context, place, None, &uploads, encoder)?;
            // Where a later operation fails, what it would have been submitted with is lost: not this vector.
            submit(context, place, encoder)?;
            Ok(vector)
        })
    }

    fn download(&self, vector: &DeviceVector) -> Result<Vec<f32>> {
        self.work(|context, recorder| {
            let longest = recorder.staging.longest();
            let mut bytes = vec![0; 4 * vector.len()];
            let (mut parts, mut rest) = (Vec::new(), bytes.as_mut_slice());
            for (window, source) in self.windows(vector.len()).zip(vector.buffers()?) {
                for at in (0..window.len()).step_by(longest) {
                    let len = longest.min(window.len() - at);
                    let (part, behind) = std::mem::take(&mut rest).split_at_mut(4 * len);
                    rest = behind;
                    let bytes = 4 * len.next_multiple_of(4);
                    parts.push(Download { source, offset: 4 * at as u64, bytes, sink: Sink::Bytes(part) });
                }
            }
            recorder.read(context, self.place, parts)?;
            Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        })
    }

    /// x + factor·y, or factor·x.
    fn computed(self: &Arc<Self>, x: &DeviceVector, factor: f64, y: Option<&DeviceVector>) -> Result<DeviceVector> {
        assert!(y.is_none_or(|y| y.len() == x.len()), "vectors of one length");
        self.work(|context, recorder| {
            let place = self.place;
            let pipelines = context.vector_pipelines(place)?;
            let pipeline = if y.is_some() { &pipelines.add_scaled } else { &pipelines.scale };
            let out = self.vector(context, x.len())?;
            let (from, with, to) = (x.buffers()?, y.unwrap_or(x).buffers()?, out.buffers()?);
            for (k, window) in self.windows(x.len()).enumerate() {
                let operation =
                    Operation { factor: factor as f32, elements: [0, window.len() as u32], ..Operation::default() };
                let buffers = [&to[k], &from[k], &with[k]];
                recorder.record(context, place, (&pipelines, pipeline), operation, buffers)?;
            }
            Ok(out)
        })
    }

    fn reduced<const N: usize>(&self, wanted: &[Reduction<'_, DeviceVector>; N]) -> Result<[f64; N]> {
        let mut ends = [0; N];
        let words = self.work(|context, recorder| self.results(context, recorder, wanted, &mut ends))?;
        let mut start = 0;
        let mut numbers = wanted.iter().zip(ends).map(|(one, end)| {
            let blocks = &words[std::mem::replace(&mut start, end)..end];
            match one {
                Reduction::Largest(..) => {
                    join_tree(&mut blocks.iter().map(largest_of_block).collect::<Vec<_>>(), f64::max_nan)
                }
                _ => tree(&mut blocks.iter().map(sum_of_block).collect::<Vec<_>>()),
            }
        });
        Ok(std::array::from_fn(|_| numbers.next().unwrap_or(f64::NAN)))
    }

    /// The results of all blocks, and where those of each number end.
    fn results<const N: usize>(
        &self,
        context: &Context,
        recorder: &mut Recorder,
        wanted: &[Reduction<'_, DeviceVector>; N],
        ends: &mut [usize; N],
    ) -> Result<Vec<[u32; 4]>> {
        let place = self.place;
        let pipelines = context.vector_pipelines(place)?;
        // Each window's dispatch, and the results so far.
        let (mut dispatches, mut results) = (Vec::new(), 0u32);
        for (one, end) in wanted.iter().zip(ends) {
            let (x, y, part, pipeline) = match one {
                Reduction::Dot(x, y) => (x, y, 0..x.len().min(y.len()), &pipelines.sum),
                Reduction::SumAbs(x) => (x, x, 0..x.len(), &pipelines.sum),
                Reduction::Largest(x, part) => (x, x, part.clone(), &pipelines.largest),
            };
            for (k, window) in self.windows(part.end).enumerate().filter(|(_, window)| window.end > part.start) {
                let within = |at: usize| at.saturating_sub(window.start).min(window.len()) as u32;
                let operation = Operation {
                    elements: [within(part.start), within(part.end)],
                    result: results,
                    is_sum_abs: matches!(one, Reduction::SumAbs(_)),
                    ..Operation::default()
                };
                results += operation.blocks();
                dispatches.push((pipeline, operation, &x.buffers()?[k], &y.buffers()?[k]));
            }
            *end = results as usize;
        }
        if dispatches.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = RESULT_BYTES * results as usize;
        let target = match recorder.results.take().filter(|buffer| buffer.size() >= bytes as u64) {
            Some(buffer) => buffer,
            None => {
                let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
                let bytes = bytes.next_power_of_two() as u64;
                context.scoped(place, || Ok(context.buffer("results", bytes, usage, false)))?
            }
        };
        for (pipeline, operation, x, y) in dispatches {
            recorder.record(context, place, (&pipelines, pipeline), operation, [&target, x, y])?;
        }
        let mut found = vec![0; bytes];
        let whole = Download { source: &target, offset: 0, bytes, sink: Sink::Bytes(found.as_mut_slice()) };
        recorder.read(context, place, vec![whole])?;
        recorder.results = Some(target);
        let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        let blocks = found.as_chunks().0.as_chunks::<4>().0.iter();
        Ok(blocks.map(|block| block.each_ref().map(word)).collect())
    }
}

fn largest_of_block(words: &[u32; 4]) -> f64 {
    f64::from(f32::from_bits(words[0]))
}

fn sum_of_block(&[hi, lo, exponent, special]: &[u32; 4]) -> f64 {
    match special {
        0 => {
            let significand = f64::from(f32::from_bits(hi)) + f64::from(f32::from_bits(lo));
            libm::scalbn(significand, exponent.cast_signed())
        }
        HAS_PLUS_INFINITY => f64::INFINITY,
        HAS_MINUS_INFINITY => f64::NEG_INFINITY,
        bits => {
            debug_assert!(bits & HAS_NAN != 0 || bits == HAS_PLUS_INFINITY | HAS_MINUS_INFINITY);
            f64::NAN
        }
    }
}

/// The memory of a vector.
#[derive(Debug)]
struct Body {
    home: Arc<Home>,
    len: usize,
    /// By window; none where an operation could not make it.
    buffers: OfProcess<Vec<wgpu::Buffer>>,
}

impl Drop for Body {
    fn drop(&mut self) {
        // A forked child leaks them.
        let (Ok(buffers), Ok(spare)) = (self.buffers.get_mut(self.home.place), self.home.spare.get(self.home.place))
        else {
            return;
        };
        let mut spare = lock(spare);
        for buffer in buffers.drain(..) {
            spare.entry(buffer.size()).or_default().push(buffer);
        }
    }
}

/// A vector of f32 on the device. Its default has no elements.
#[derive(Debug, Clone, Default)]
pub struct DeviceVector(Option<Arc<Body>>);

impl DeviceVector {
    fn home(&self) -> Option<&Arc<Home>> {
        self.0.as_ref().map(|body| &body.home)
    }

    fn buffers(&self) -> Result<&[wgpu::Buffer]> {
        let Some(body) = &self.0 else { return Ok(&[]) };
        let buffers = body.buffers.get(body.home.place)?;
        if body.len > 0 && buffers.is_empty() {
            let sentence = format!("{}: an earlier operation on the GPU failed", body.home.place);
            return Err(Error::plain(ErrorKind::Device, sentence));
        }
        Ok(buffers)
    }

    /// `compute`'s vector of the length of `like`, or one that stands for an error.
    fn made(like: &Self, compute: impl FnOnce(&Arc<Home>) -> Result<Self>) -> Self {
        let Some(home) = like.home() else { return Self::default() };
        if home.has_failed() {
            return home.broken(like.len(), None);
        }
        compute(home).unwrap_or_else(|error| home.broken(like.len(), Some(error)))
    }
}

impl Vector for DeviceVector {
    type Real = f32;
    type Home = VectorHome;

    fn new(VectorHome(home): &VectorHome, x: &[f32]) -> Result<Self> {
        home.upload(x)
    }

    fn to_host(&self) -> Result<Cow<'_, [f32]>> {
        Ok(match self.home() {
            Some(home) if !self.is_empty() => Cow::Owned(home.download(self)?),
            _ => Cow::Borrowed(&[]),
        })
    }

    fn outcome(VectorHome(home): &VectorHome) -> Result<()> {
        lock(&home.failure).take().map_or(Ok(()), Err)
    }

    fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |body| body.len)
    }

    fn reduce<const N: usize>(wanted: [Reduction<'_, Self>; N]) -> [f64; N] {
        let home = wanted.iter().find_map(|one| match one {
            Reduction::Dot(x, _) | Reduction::SumAbs(x) | Reduction::Largest(x, _) => x.home(),
        });
        let Some(home) = home else { return [0.0; N] };
        if home.has_failed() {
            return [f64::NAN; N];
        }
        home.reduced(&wanted).unwrap_or_else(|error| {
            lock(&home.failure).get_or_insert(error);
            [f64::NAN; N]
        })
    }

    fn set_to_sum(&mut self, x: &Self, a: f64, y: &Self) {
        *self = Self::made(x, |home| home.computed(x, a, Some(y)));
    }

    fn add_scaled(&mut self, a: f64, x: &Self) {
        *self = Self::made(self, |home| home.computed(self, a, Some(x)));
    }

    fn scale(&mut self, a: f64) {
        *self = Self::made(self, |home| home.computed(self, a, None));
    }

    fn minus(&self, other: &Self) -> Self {
        Self::made(self, |home| home.computed(self, -1.0, Some(other)))
    }

    fn negative(&self) -> Self {
        Self::made(self, |home| home.computed(self, -1.0, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A space on a device of its own; `None` without an adapter.
    fn space() -> Option<VectorSpace> {
        let request = DeviceRequest { allow_software: true, alone: true, ..DeviceRequest::default() };
        match VectorSpace::new("LBFGS", &request) {
            Err(e) if e.kind() == ErrorKind::NoAdapter => {
                assert!(std::env::var("ROPTIM_REQUIRE_GPU").as_deref() != Ok("1"), "{e}");
                None
            }
            space => Some(space.unwrap()),
        }
    }

    #[test]
    fn an_operation_that_fails_is_remembered_once() {
        let Some(space) = space() else { return };
        let home = space.home();
        let x = DeviceVector::new(&home, &[3.0, -4.0]).unwrap();
        assert_eq!(x.dot(&x), 25.0);
        space.force_loss();
        let mut y = x.negative();
        assert!(y.largest().is_nan());
        y.add_scaled(2.0, &x);
        assert_eq!((y.len(), y.dot(&x).is_nan()), (2, true));
        assert_eq!(DeviceVector::outcome(&home).unwrap_err().kind(), ErrorKind::DeviceLost);
        DeviceVector::outcome(&home).unwrap();
        assert!(y.to_host().is_err() && x.to_host().is_err());
        assert_eq!(DeviceVector::new(&home, &[1.0]).unwrap_err().kind(), ErrorKind::DeviceLost);
    }

    #[test]
    fn buffers_are_used_again_and_more_operations_than_one_submission_takes() {
        let Some(mut space) = space() else { return };
        space.force(1);
        let home = space.home();
        let n = 2 * SUM_BLOCK + 1;
        let one = DeviceVector::new(&home, &vec![1.0; n]).unwrap();
        let mut x = DeviceVector::new(&home, &vec![0.0; n]).unwrap();
        for _ in 0..2 * MOST_RECORDED {
            x.add_scaled(0.5, &one);
        }
        assert_eq!(*x.to_host().unwrap(), vec![MOST_RECORDED as f32; n]);
        drop((x, one));
        let spare = lock(home.0.spare.get("").unwrap()).values().map(Vec::len).sum::<usize>();
        assert_eq!(spare, 3 * 3, "two vectors and the one that an operation writes");
    }

    #[test]
    fn without_elements_nothing_happens() {
        let Some(space) = space() else { return };
        let home = space.home();
        let mut x = DeviceVector::new(&home, &[]).unwrap();
        x.add_scaled(1.0, &x.clone());
        assert_eq!((x.dot(&x), x.largest(), x.sum_abs(), x.to_host().unwrap().len()), (0.0, 0.0, 0.0, 0));
        assert_eq!(DeviceVector::default().dot(&DeviceVector::new(&home, &[1.0]).unwrap()), 0.0);
        DeviceVector::outcome(&home).unwrap();
    }

    #[test]
    fn a_forked_child_is_refused() {
        let Some(mut space) = space() else { return };
        Arc::get_mut(&mut space.context).unwrap().pretend_forked();
        assert_eq!(space.accept(&[], 0).unwrap_err().kind(), ErrorKind::Forked);
        assert_eq!(DeviceVector::new(&space.home(), &[1.0]).unwrap_err().kind(), ErrorKind::Forked);
    }
}
