//! One step of many tensors on the device.
//!
//! ```text
//! upload   gradients, plain parameters, coefficient rows      one staging block
//! update   one dispatch per (kernel, window), all tensors     one workgroup per chunk
//! download plain parameters                                   one staging block
//! ```
//!
//! All of it is one submission, unless the arrays exceed a staging block. The chunk tables and bind
//! groups of a step are kept for the next one and rebuilt only when the set of tensors, their kernels or
//! their coefficient rows change.
//!
//! It does not read gradients on the device for norms, and it stages on the calling thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::arena::{ALIGN, Arena, Role, Segment};
use super::context::{Context, DeviceInfo, DeviceRequest, OfProcess};
use super::pipeline::Pipeline;
use super::staging::{BLOCK_BYTES, Download, Source, Staging, Upload, submit};
use crate::cpu::{Frame, memory};
use crate::error::{Error, ErrorKind, Result};
use crate::real::Dtype;
use crate::rule::{KernelFacts, Row, SlotSet};
use crate::rules::RuleId;
use crate::shader::{BOUNDED, CHUNK_WORDS, FIRST_SLOT_BINDING, FLUSH_SUBNORMALS, FRAME_WORDS, L2, ROW_WORDS};
use crate::store::ParamInfo;
use crate::tensor::{RawTensor, TensorMut, TensorRef};

/// Elements of a chunk: what one workgroup updates.
pub const CHUNK: usize = 4096;

/// One parameter's part in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Which parameter.
    pub index: usize,
    /// Which coefficient row.
    pub row: usize,
    /// The kernel.
    pub kernel: KernelFacts,
    /// Slots that [`Executor::missing`] reported.
    pub fresh: SlotSet,
}

/// What is known of one parameter's copies.
#[derive(Debug, Clone, Copy, Default)]
struct Param {
    len: usize,
    resident: bool,
    /// Slots that exist.
    present: SlotSet,
    /// Slots whose memory was ever written: it is cleared before it counts as zero again.
    used: SlotSet,
    /// The host's value must be uploaded before the next step. Of a resident parameter.
    host_newer: bool,
    /// The device's value is ahead of the host's. Of a resident parameter.
    device_newer: bool,
}

/// Dispatches of one set of jobs.
#[derive(Debug, Default)]
struct Plan {
    jobs: Vec<Job>,
    generation: Option<u64>,
    dispatches: Vec<Dispatch>,
}

#[derive(Debug)]
struct Dispatch {
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    workgroups: u32,
}

#[derive(Debug)]
struct Inner {
    context: Arc<Context>,
    arena: Arena,
    staging: Staging,
    rows: Option<wgpu::Buffer>,
    plan: Plan,
}

/// Runs a rule over tensors on one GPU.
#[derive(Debug)]
pub struct Executor {
    place: &'static str,
    rule: RuleId,
    chunk: usize,
    params: Vec<Param>,
    inner: OfProcess<Inner>,
}

impl Executor {
    /// Opens the device that the request asks for; `place` is the optimizer's name in messages.
    pub fn new(place: &'static str, rule: RuleId, request: &DeviceRequest) -> Result<Self> {
        Ok(Self::on(Context::shared(place, request)?, place, rule))
    }

    pub(super) fn on(context: Arc<Context>, place: &'static str, rule: RuleId) -> Self {
        let limits = context.device.limits();
        let window = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 4;
        let arena = Arena::new(usize::try_from(window).unwrap_or(usize::MAX / 8));
        let staging = Staging::new(BLOCK_BYTES);
        let inner = OfProcess::new(Inner { context, arena, staging, rows: None, plan: Plan::default() });
        Self { place, rule, chunk: CHUNK, params: Vec::new(), inner }
    }

    /// The device.
    pub fn device(&self) -> Result<&DeviceInfo> {
        Ok(&self.inner.get(self.place)?.context.info)
    }

    /// The device's name, for people.
    pub fn device_name(&self) -> &str {
        self.device().map_or("a GPU of the parent process", |info| &info.name)
    }

    /// For tests: windows and staging blocks of so many elements, chunks of so many. Works until the first
    /// step or load; results do not change.
    pub fn force(&mut self, window: usize, chunk: usize) {
        let chunk = chunk.next_multiple_of(4).max(4);
        let Ok(inner) = self.inner.get_mut(self.place) else { return };
        if inner.arena.is_unallocated() {
            inner.arena.layout = inner.arena.layout.rewindowed(window);
            inner.staging = Staging::new(4 * window.max(ALIGN));
            self.chunk = chunk;
        }
    }

    /// Registers parameters. On an error nothing has changed.
    pub fn add(&mut self, params: &[ParamInfo]) -> Result<()> {
        let place = self.place;
        let inner = self.inner.get_mut(place)?;
        let mut total = inner.arena.layout.total();
        for (i, info) in params.iter().enumerate() {
            let label = || info.label(self.params.len() + i);
            if info.dtype.part() != Dtype::F32 {
                let allowed = "float32 or complex64 on the GPU";
                return Err(Error::refuse(ErrorKind::Type, place, label(), allowed, info.dtype)
                    .with_remedy(format!("use backend=\"cpu\" for {}", info.dtype)));
            }
            let elements = info.shape.iter().try_fold(info.dtype.parts(), |n, &axis| n.checked_mul(axis));
            let sum = elements.and_then(|n| n.checked_next_multiple_of(ALIGN)).and_then(|n| n.checked_add(total));
            total = sum.filter(|&n| n <= isize::MAX as usize / 4).ok_or_else(|| {
                Error::refuse(
                    ErrorKind::Value,
                    place,
                    label(),
                    "of a size that memory can hold",
                    format!("{:?}", info.shape),
                )
            })?;
        }
        for info in params {
            inner.arena.layout.push(info.reals());
            self.params.push(Param {
                len: info.reals(),
                resident: info.resident,
                host_newer: true,
                ..Param::default()
            });
        }
        Ok(())
    }

    /// Of the wanted slots those that a parameter does not have: they begin as zeros in the step whose job
    /// names them fresh.
    pub fn missing(&self, index: usize, wanted: SlotSet) -> SlotSet {
        wanted.without(self.params[index].present)
    }

    /// Whether slot k of a parameter exists.
    pub fn has_slot(&self, index: usize, k: usize) -> bool {
        self.params[index].present.has(k)
    }

    /// Forgets a parameter's slots.
    pub fn clear_slots(&mut self, index: usize) -> Result<()> {
        self.inner.get(self.place)?;
        self.params[index].present = SlotSet::EMPTY;
        Ok(())
    }

    /// A copy of slot k of a parameter in C order, if it exists.
    pub fn read_slot(&self, index: usize, k: usize) -> Result<Option<Vec<u8>>> {
        Ok(self.read_slots(&[(index, k)])?.pop().flatten())
    }

    /// Copies of slots, each named by its parameter's index and k, brought home together.
    pub fn read_slots(&self, wanted: &[(usize, usize)]) -> Result<Vec<Option<Vec<u8>>>> {
        let inner = self.inner.get(self.place)?;
        let exists = |&&(index, k): &&(usize, usize)| self.has_slot(index, k);
        let sources: Vec<_> = wanted.iter().filter(exists).map(|&(index, k)| (Role::Slot(k), index)).collect();
        let mut found: Vec<Vec<u8>> = sources.iter().map(|&(_, index)| vec![0; 4 * self.params[index].len]).collect();
        inner.read(self.place, &sources, |which, segment, part| {
            found[which][4 * segment.start..][..part.len()].copy_from_slice(part);
        })?;
        let mut found = found.into_iter();
        Ok(wanted.iter().map(|slot| exists(&slot).then(|| found.next()).flatten()).collect())
    }

    /// Replaces every slot of every parameter: by parameter and slot the bytes in C order, or `None` where
    /// there is no slot. On an error other than [`ErrorKind::DeviceLost`] nothing has changed.
    pub fn replace_slots(&mut self, slots: &[Vec<Option<&[u8]>>]) -> Result<()> {
        let place = self.place;
        let Inner { context, arena, staging, .. } = self.inner.get_mut(place)?;
        assert_eq!(slots.len(), self.params.len(), "one list of slots per parameter");
        let given = || {
            let parameters = slots.iter().enumerate();
            parameters
                .flat_map(|(i, slots)| slots.iter().enumerate().filter_map(move |(k, bytes)| Some((i, k, (*bytes)?))))
        };
        let mut wanted = BTreeSet::new();
        for (index, k, bytes) in given() {
            assert_eq!(bytes.len(), 4 * self.params[index].len, "a slot is as long as its parameter");
            wanted.extend(arena.layout.segments(index, usize::MAX).map(|s| (Role::Slot(k), s.window)));
        }
        arena.ensure(context, place, &wanted)?;
        let mut uploads = Vec::new();
        for (index, k, bytes) in given() {
            for segment in arena.layout.segments(index, staging.longest()) {
                let source = Source::Bytes(&bytes[4 * segment.start..][..4 * segment.len]);
                uploads.push(upload(place, arena, Role::Slot(k), segment, source)?);
            }
        }
        let encoder = context.device.create_command_encoder(&Default::default());
        // SAFETY: no source is an array.
        let encoder = unsafe { staging.upload(context, place, &uploads, encoder) }?;
        submit(context, place, encoder)?;
        for (param, slots) in self.params.iter_mut().zip(slots) {
            let given = slots.iter().enumerate().filter(|(_, slot)| slot.is_some());
            param.present = given.fold(SlotSet::EMPTY, |set, (k, _)| set.with(k));
            param.used = param.used.union(param.present);
        }
        Ok(())
    }

    /// Whether the device's value of a parameter is ahead of the host's.
    pub fn host_is_stale(&self, index: usize) -> bool {
        self.params[index].device_newer
    }

    /// The host's value of a resident parameter becomes the truth.
    pub fn host_written(&mut self, index: usize) {
        let param = &mut self.params[index];
        param.host_newer = true;
        param.device_newer = false;
    }

    /// Brings a parameter's value to the host's array if the device's is ahead. The array must be of the
    /// parameter's length and dtype.
    pub fn sync(&mut self, index: usize, array: &mut TensorMut<'_>) -> Result<()> {
        let inner = self.inner.get(self.place)?;
        let param = &mut self.params[index];
        if !param.device_newer {
            return Ok(());
        }
        let raw = float32(&array.raw, param.len);
        inner.read(self.place, &[(Role::Parameter, index)], |_, segment, part| {
            // SAFETY: TensorMut promises memory for its elements, whose number was compared; segments lie
            // within the parameter.
            unsafe { memory::write_bytes(raw, segment.start, part) };
        })?;
        param.device_newer = false;
        Ok(())
    }

    /// One update of the jobs' parameters. `params` and `gradients` are by parameter index, of the
    /// parameters' lengths and dtype. On an error other than [`ErrorKind::DeviceLost`] nothing has changed.
    pub fn step(
        &mut self,
        rows: &[Row],
        jobs: &[Job],
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
    ) -> Result<()> {
        let (place, rule, chunk) = (self.place, self.rule, self.chunk);
        let inner = self.inner.get_mut(place)?;
        inner.context.check(place)?;
        inner.prepare(place, rule, chunk, rows.len(), jobs)?;
        let Inner { context, arena, staging, rows: row_buffer, plan } = inner;
        let row_bytes = rows.iter().flat_map(row_words).flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let mut uploads = Vec::new();
        if let Some(target) = row_buffer {
            uploads.push(Upload { target, offset: 0, bytes: row_bytes.len(), source: Source::Bytes(&row_bytes) });
        }
        for role in [Role::Parameter, Role::Gradient] {
            for job in jobs {
                let state = &self.params[job.index];
                let raw = match (role, &gradients[job.index]) {
                    (Role::Gradient, Some(gradient)) => &gradient.raw,
                    (Role::Parameter, _) if !state.resident || state.host_newer => &params[job.index].raw,
                    _ => continue,
                };
                let raw = float32(raw, state.len);
                for segment in arena.layout.segments(job.index, staging.longest()) {
                    let source = Source::Array { raw, start: segment.start, len: segment.len };
                    uploads.push(upload(place, arena, role, segment, source)?);
                }
            }
        }
        let (mut downloads, mut targets) = (Vec::new(), Vec::new());
        for job in jobs.iter().filter(|job| !self.params[job.index].resident) {
            for segment in arena.layout.segments(job.index, staging.longest()) {
                downloads.push(download(place, arena, Role::Parameter, segment)?);
                targets.push((job.index, segment));
            }
        }
        let encoder = context.device.create_command_encoder(&Default::default());
        // SAFETY: TensorMut and TensorRef promise memory for their elements, whose number and size
        // `float32` compared; segments lie within the parameter.
        let mut encoder = unsafe { staging.upload(context, place, &uploads, encoder) }?;
        for job in jobs {
            for k in job.fresh.intersection(self.params[job.index].used).iter() {
                for segment in arena.layout.segments(job.index, usize::MAX) {
                    let buffer = arena.buffer(place, Role::Slot(k), segment.window)?;
                    encoder.clear_buffer(buffer, offset(segment), Some(padded(segment) as u64));
                }
            }
        }
        plan.record(context, &mut encoder);
        staging.download(context, place, encoder, &downloads, |i, part| {
            let (index, segment) = targets[i];
            // SAFETY: as above; the tensor is writable and nothing else writes it in this call.
            unsafe { memory::write_bytes(&params[index].raw, segment.start, &part[..4 * segment.len]) };
        })?;
        for job in jobs {
            let param = &mut self.params[job.index];
            param.present = param.present.union(job.fresh);
            param.used = param.used.union(job.fresh);
            param.host_newer = !param.resident;
            param.device_newer = param.resident;
        }
        Ok(())
    }
}

impl Inner {
    /// Memory, coefficient rows and dispatches for the jobs; kept from the last step where they fit.
    fn prepare(&mut self, place: &str, rule: RuleId, chunk: usize, rows: usize, jobs: &[Job]) -> Result<()> {
        let Self { context, arena, rows: row_buffer, plan, .. } = self;
        let same = |(a, b): (&Job, &Job)| (a.index, a.row, a.kernel.entry) == (b.index, b.row, b.kernel.entry);
        let row_bytes = (4 * ROW_WORDS * rows) as u64;
        let rows_fit = row_buffer.as_ref().is_some_and(|buffer| buffer.size() >= row_bytes);
        let known = plan.generation == Some(arena.generation) && plan.jobs.len() == jobs.len();
        if rows_fit && known && plan.jobs.iter().zip(jobs).all(same) {
            return Ok(());
        }
        let mut wanted = BTreeSet::new();
        let mut tables: BTreeMap<(&'static str, usize), (KernelFacts, Vec<u32>)> = BTreeMap::new();
        for job in jobs {
            for segment in arena.layout.segments(job.index, usize::MAX) {
                wanted.extend([Role::Parameter, Role::Gradient].map(|role| (role, segment.window)));
                wanted.extend(job.kernel.slots.iter().map(|&k| (Role::Slot(k), segment.window)));
                let key = (job.kernel.entry, segment.window);
                let (_, table) = tables.entry(key).or_insert_with(|| (job.kernel, Vec::new()));
                for start in (0..segment.len).step_by(chunk) {
                    // A window's vec4s and the chunks in it are fewer than 2³², since its bytes are
                    // limited to what one binding may span; rows are fewer than parameters.
                    let words = [(segment.at + start) / 4, chunk.min(segment.len - start), job.row];
                    table.extend(words.map(|word| word as u32));
                }
            }
        }
        arena.ensure(context, place, &wanted)?;
        plan.generation = None;
        if !rows_fit {
            let bytes = row_bytes.next_power_of_two().max(1024);
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
            *row_buffer = Some(context.scoped(place, || Ok(context.buffer("rows", bytes, usage, false)))?);
        }
        plan.dispatches.clear();
        for ((_, window), (kernel, table)) in &tables {
            let pipeline = context.pipeline(place, rule, kernel)?;
            let roles = [Role::Parameter, Role::Gradient];
            let [parameters, gradients] = roles.map(|role| arena.buffer(place, role, *window));
            let slots = kernel.slots.iter().map(|&k| arena.buffer(place, Role::Slot(k), *window));
            let slots = slots.collect::<Result<Vec<_>>>()?;
            let (parameters, gradients, rows) = (parameters?, gradients?, row_buffer.as_ref());
            plan.dispatches.push(context.scoped(place, || {
                let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_le_bytes()).collect();
                let chunks = context.buffer("chunks", bytes.len() as u64, wgpu::BufferUsages::STORAGE, true);
                chunks
                    .slice(..)
                    .get_mapped_range_mut()
                    .map_err(|e| super::staging::unmapped(place, e))?
                    .copy_from_slice(&bytes);
                chunks.unmap();
                let buffers = [Some(parameters), Some(gradients), Some(&chunks), rows];
                let fixed = (0..).zip(buffers.into_iter().flatten());
                let entries: Vec<_> = fixed
                    .chain((FIRST_SLOT_BINDING..).zip(slots))
                    .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
                    .collect();
                let bind_group = context.device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: Some(kernel.entry),
                    layout: &pipeline.layout,
                    entries: &entries,
                });
                Ok(Dispatch { pipeline, bind_group, workgroups: (table.len() / CHUNK_WORDS) as u32 })
            })?);
        }
        plan.jobs = jobs.to_vec();
        plan.generation = Some(arena.generation);
        Ok(())
    }

    /// Reads tensors' segments in order; `take` gets the tensor's position in `sources`.
    fn read(&self, place: &str, sources: &[(Role, usize)], mut take: impl FnMut(usize, Segment, &[u8])) -> Result<()> {
        let (mut downloads, mut targets) = (Vec::new(), Vec::new());
        for (which, &(role, index)) in sources.iter().enumerate() {
            for segment in self.arena.layout.segments(index, self.staging.longest()) {
                downloads.push(download(place, &self.arena, role, segment)?);
                targets.push((which, segment));
            }
        }
        if downloads.is_empty() {
            return Ok(());
        }
        let encoder = self.context.device.create_command_encoder(&Default::default());
        self.staging.download(&self.context, place, encoder, &downloads, |i, part| {
            let (which, segment) = targets[i];
            take(which, segment, &part[..4 * segment.len]);
        })
    }
}

impl Plan {
    fn record(&self, context: &Context, encoder: &mut wgpu::CommandEncoder) {
        let widest = context.device.limits().max_compute_workgroups_per_dimension;
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for dispatch in &self.dispatches {
            pass.set_pipeline(&dispatch.pipeline.compute);
            pass.set_bind_group(0, &dispatch.bind_group, &[]);
            pass.dispatch_workgroups(dispatch.workgroups.min(widest), dispatch.workgroups.div_ceil(widest), 1);
        }
    }
}

/// The array, which must be of so many float32 elements.
fn float32(raw: &RawTensor, len: usize) -> &RawTensor {
    assert!(raw.len == len && raw.dtype == Dtype::F32, "the optimizer compares lengths and dtypes first");
    raw
}

fn offset(segment: Segment) -> u64 {
    4 * segment.at as u64
}

/// Bytes of a segment with its padding.
fn padded(segment: Segment) -> usize {
    4 * segment.len.next_multiple_of(ALIGN)
}

fn upload<'a>(place: &str, arena: &'a Arena, role: Role, segment: Segment, source: Source<'a>) -> Result<Upload<'a>> {
    let target = arena.buffer(place, role, segment.window)?;
    Ok(Upload { target, offset: offset(segment), bytes: padded(segment), source })
}

fn download<'a>(place: &str, arena: &'a Arena, role: Role, segment: Segment) -> Result<Download<'a>> {
    let source = arena.buffer(place, role, segment.window)?;
    Ok(Download { source, offset: offset(segment), bytes: padded(segment) })
}

/// A coefficient row as the shader's struct `Row`: every f64 rounded once to f32, as on the CPU.
fn row_words(row: &Row) -> [u32; ROW_WORDS] {
    let frame = Frame::<f32>::new(&row.shared);
    let l2 = if frame.l2.is_some() { L2 } else { 0 };
    let flush = if row.shared.flush_subnormals { FLUSH_SUBNORMALS } else { 0 };
    let bounded = if frame.bound.is_some() { BOUNDED } else { 0 };
    let [bound, factor, decay, shrink] =
        [frame.bound.unwrap_or(0.0), frame.gradient_factor, frame.l2.unwrap_or(0.0), frame.shrink].map(f32::to_bits);
    let mut words = [0; ROW_WORDS];
    let (head, coefficients) = words.split_at_mut(FRAME_WORDS);
    head.copy_from_slice(&[bound, factor, decay, shrink, l2 | flush | bounded]);
    for (word, &value) in coefficients.iter_mut().zip(&row.coefficients) {
        *word = (value as f32).to_bits();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{MAX_COEFFICIENTS, Shared};

    /// An executor of Adam over one parameter of three elements on a device of its own; `None` without
    /// an adapter.
    fn executor() -> Option<Executor> {
        let request = DeviceRequest { allow_software: true, ..DeviceRequest::default() };
        let context = match Context::private("Adam", &request) {
            Err(e) if e.kind() == ErrorKind::NoAdapter => {
                assert!(std::env::var("ROPTIM_REQUIRE_GPU").as_deref() != Ok("1"), "{e}");
                return None;
            }
            context => context.unwrap(),
        };
        let mut executor = Executor::on(context, "Adam", RuleId::Adam);
        executor.add(&[ParamInfo::vector("w", 3, Dtype::F32)]).unwrap();
        Some(executor)
    }

    /// One step with every coefficient but `eps` 1: where gradient and moments are zero it is 0/0.
    fn step(executor: &mut Executor, w: &mut [f32; 3], g: [f32; 3]) -> Result<()> {
        let shared = Shared { flush_subnormals: true, ..Shared::NEUTRAL };
        let mut coefficients = [0.0; MAX_COEFFICIENTS];
        for (value, name) in coefficients.iter_mut().zip(RuleId::Adam.kernels()[0].coefficients) {
            *value = if *name == "eps" { 0.0 } else { 1.0 };
        }
        let fresh = executor.missing(0, SlotSet::of(&[0, 1]));
        let job = Job { index: 0, row: 0, kernel: RuleId::Adam.kernels()[0], fresh };
        let mut params = [w.as_mut_slice().into()];
        executor.step(&[Row { shared, coefficients }], &[job], &mut params, &[Some(g.as_slice().into())])
    }

    #[test]
    fn padding_stays_zero() {
        let Some(mut executor) = executor() else { return };
        let mut w = [1.0, 2.0, 3.0];
        step(&mut executor, &mut w, [1.0, 0.0, 4.0]).unwrap();
        assert!(w[1].is_nan() && w[0] == 2.0);
        let inner = executor.inner.get("").unwrap();
        for role in [Role::Parameter, Role::Gradient, Role::Slot(0), Role::Slot(1)] {
            let source = inner.arena.buffer("", role, 0).unwrap();
            let whole = [Download { source, offset: 0, bytes: 4 * ALIGN }];
            let encoder = inner.context.device.create_command_encoder(&Default::default());
            let check = |_: usize, bytes: &[u8]| assert!(bytes[12..].iter().all(|&b| b == 0), "{role:?}: {bytes:?}");
            inner.staging.download(&inner.context, "", encoder, &whole, check).unwrap();
        }
    }

    #[test]
    fn a_lost_device_is_an_error_with_a_name() {
        let Some(mut executor) = executor() else { return };
        let mut w = [1.0, 2.0, 3.0];
        step(&mut executor, &mut w, [1.0; 3]).unwrap();
        let before = w;
        let device = executor.inner.get("").unwrap().context.device.clone();
        device.destroy();
        // The word of the loss comes with the next poll.
        let _ = device.poll(wgpu::PollType::wait_indefinitely());
        let error = step(&mut executor, &mut w, [1.0; 3]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeviceLost, "{error}");
        assert!(error.to_string().ends_with("; make a new optimizer and restore parameters and state"), "{error}");
        assert_eq!(w, before);
        assert_eq!(executor.read_slot(0, 0).unwrap_err().kind(), ErrorKind::DeviceLost);
    }

    #[test]
    fn a_refused_allocation_changes_nothing() {
        let Some(mut executor) = executor() else { return };
        let inner = executor.inner.get_mut("").unwrap();
        // One window longer than any buffer may be; drivers that overcommit never run out of memory here.
        let plain = inner.arena.layout.rewindowed(1 << 20);
        inner.arena.layout = inner.arena.layout.rewindowed(1 << 50);
        inner.arena.layout.push(1 << 50);
        let error = inner.arena.ensure(&inner.context, "Adam", &[(Role::Parameter, 0)].into()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().starts_with("Adam: the GPU refused an operation: "), "{error}");
        assert!(inner.arena.is_unallocated() && inner.arena.generation == 0);
        inner.arena.layout = plain;
        let mut w = [1.0, 2.0, 3.0];
        step(&mut executor, &mut w, [1.0; 3]).unwrap();
    }

    #[test]
    fn a_forked_child_is_refused() {
        let Some(mut executor) = executor() else { return };
        executor.inner.pretend_forked();
        let mut w = [1.0, 2.0, 3.0];
        assert_eq!(step(&mut executor, &mut w, [1.0; 3]).unwrap_err().kind(), ErrorKind::Forked);
        assert_eq!(executor.read_slot(0, 0).unwrap_err().kind(), ErrorKind::Forked);
        assert_eq!(executor.add(&[]).unwrap_err().kind(), ErrorKind::Forked);
    }
}
