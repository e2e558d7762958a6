//! One step of many tensors on the device.
//!
//! ```text
//! upload   gradients, plain parameters, control words and coefficient rows
//! guard    norm, clip factor, what is not finite             where it is asked for
//! update   one dispatch per (kernel, window), all tensors    one workgroup per chunk; a tensor rule's passes
//! download plain parameters
//! ```
//!
//! All of it is one submission, unless the arrays exceed a staging block. Nothing is read back but plain parameters:
//! the norm is fetched when somebody asks for it, and what became of a step that may leave its update out is
//! *pending* until [`Executor::settle`]. Chunk tables and bind groups of the last few sets of tensors are kept.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use rayon::ThreadPool;

use super::arena::{Arena, Layout, Role, Segment, Window};
use super::array::{Array, is_sum};
use super::context::{Context, DeviceInfo, DeviceRequest, OfProcess, refuse_wide};
use super::passes::{Bounds, CHUNK, Dispatch, Finding, GuardPasses, Table};
use super::program::{self, Bound, Member, Scratch};
use super::staging::{BLOCK_BYTES, Download, Part, Sink, Source, Staging, Ticket, Upload, submit, unmapped};
use crate::cpu::Frame;
use crate::drill::point;
use crate::error::{Error, ErrorKind, Result, shape_text};
use crate::real::Dtype;
use crate::rule::{Form, KernelFacts, MAX_AREAS, Program, Row, SlotSet};
use crate::rules::{Method, RuleId, TensorRuleId};
use crate::shader::{self, CONTROL_WORDS, FLUSH_SUBNORMALS, FRAME_WORDS, HAS_NAN, L2, ROW_WORDS};
use crate::store::ParamInfo;
use crate::tensor::{RawTensor, TensorMut, TensorRef};

/// Submissions in flight before a step waits.
const IN_FLIGHT: usize = 3;
/// Sets of jobs whose tables and bind groups are kept.
const PLANS: usize = 8;
/// Elements below which an array on the device is copied beside the others in place of a dispatch of its own.
const WORTH_A_DISPATCH: usize = 1 << 16;

/// One parameter's part in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Which parameter.
    pub index: usize,
    /// Which coefficient row.
    pub row: usize,
    /// The kernel.
    pub kernel: KernelFacts,
    /// How often the passes of a tensor rule that repeat run.
    pub turns: u32,
    /// Slots that [`Executor::missing`] reported.
    pub fresh: SlotSet,
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The update was made, or will be.
    Applied,
    /// The update was left out.
    Skipped,
    /// [`Executor::settle`] will tell.
    Pending,
}

/// A gradient that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Culprit {
    /// Of which parameter.
    pub index: usize,
    /// Whether it has a NaN; else an infinity.
    pub is_nan: bool,
}

/// What is known of one parameter's copies.
#[derive(Debug, Clone, Copy)]
struct Param {
    len: usize,
    form: Form,
    /// What it stores.
    dtype: Dtype,
    resident: bool,
    /// Slots that exist.
    present: SlotSet,
    /// Slots whose memory was ever written: it is cleared before it counts as zero again.
    used: SlotSet,
    /// The host's value must be uploaded before the next step. Of a resident parameter.
    host_newer: bool,
    /// The device's value is ahead of the host's. Of a resident parameter.
    device_newer: bool,
    /// The value went with the device, and has not been given again.
    lost: bool,
    /// Gradients were added up on the device for the next step.
    summed: bool,
}

/// Where a gradient comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    /// Uploaded, or copied from an array, to the arena of this type.
    Arena(Dtype),
    /// Sums on the device.
    Sum,
    /// An array of the user on the device, which stores this.
    Array { id: u64, buffer: usize, dtype: Dtype },
}

/// Dispatches of one set of jobs.
#[derive(Debug)]
struct Plan {
    jobs: Vec<(Job, Origin)>,
    generation: u64,
    updates: Vec<Dispatch>,
    guard: Option<GuardPasses>,
    /// The parameter of each chunk.
    owners: Vec<usize>,
}

impl Plan {
    fn is_of(&self, jobs: &[(Job, Origin)], generation: u64) -> bool {
        let same = |(a, b): (&(Job, Origin), &(Job, Origin))| {
            let facts = |(job, origin): &(Job, Origin)| (job.index, job.row, job.kernel.entry, job.turns, *origin);
            facts(a) == facts(b)
        };
        self.generation == generation && self.jobs.len() == jobs.len() && self.jobs.iter().zip(jobs).all(same)
    }

    fn has_arrays(&self) -> bool {
        self.jobs.iter().any(|(_, origin)| matches!(origin, Origin::Array { .. }))
    }
}

/// A step whose end is not known yet.
#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    jobs: Vec<Job>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<Context>,
    arena: Arena,
    scratch: Scratch,
    staging: Staging,
    /// Control words and coefficient rows.
    work: Option<wgpu::Buffer>,
    /// The last ones used, latest first.
    plans: VecDeque<Plan>,
    in_flight: VecDeque<wgpu::SubmissionIndex>,
    pending: Option<Pending>,
}

impl Inner {
    fn on(context: Arc<Context>) -> Self {
        Self {
            arena: Arena::new(context.window_elements()),
            context,
            scratch: Scratch::default(),
            staging: Staging::new(BLOCK_BYTES),
            work: None,
            plans: VecDeque::new(),
            in_flight: VecDeque::new(),
            pending: None,
        }
    }
}

/// The kinds of rules that steps of gradients have.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Elementwise(RuleId),
    Tensor(TensorRuleId),
}

impl Kind {
    fn program(self) -> Option<&'static Program> {
        match self {
            Self::Elementwise(_) => None,
            Self::Tensor(rule) => Some(rule.program()),
        }
    }
}

/// Runs a rule over tensors on one GPU.
#[derive(Debug)]
pub struct Executor {
    place: &'static str,
    rule: Kind,
    request: DeviceRequest,
    chunk: usize,
    params: Vec<Param>,
    inner: OfProcess<Inner>,
    /// A call failed half-way: what lies on the device is not known.
    broken: bool,
}

impl Executor {
    /// Opens the device that the request asks for; `place` is the optimizer's name in messages.
    pub fn new(place: &'static str, method: Method, request: &DeviceRequest) -> Result<Self> {
        let rule = match method {
            Method::Elementwise(rule) => Kind::Elementwise(rule),
            Method::Tensor(rule) => Kind::Tensor(rule),
            Method::Closure(_) => {
                return Err(Error::refuse(ErrorKind::Value, place, "backend", "\"cpu\"", "\"gpu\""));
            }
        };
        Ok(Self::on(Context::shared(place, request)?, place, rule, request.clone()))
    }

    fn on(context: Arc<Context>, place: &'static str, rule: Kind, request: DeviceRequest) -> Self {
        let inner = OfProcess::new(Inner::on(context));
        Self { place, rule, request, chunk: CHUNK, params: Vec::new(), inner, broken: false }
    }

    /// The device.
    pub fn device(&self) -> Result<&DeviceInfo> {
        Ok(&self.inner.get(self.place)?.context.info)
    }

    /// The device's name, for people.
    pub fn device_name(&self) -> &str {
        self.device().map_or("a GPU of the parent process", |info| &info.name)
    }

    /// Bytes on the device.
    pub fn device_bytes(&self) -> u64 {
        self.inner.get(self.place).map_or(0, |inner| inner.arena.bytes() + inner.scratch.bytes())
    }

    /// Dispatches of the last step.
    pub fn dispatches(&self) -> usize {
        let plan = self.inner.get(self.place).ok().and_then(|inner| inner.plans.front());
        plan.map_or(0, |plan| plan.updates.len() + plan.guard.as_ref().map_or(0, GuardPasses::dispatches))
    }

    /// For tests: windows and staging blocks of so many elements, chunks of so many. Works until parameters are
    /// added; results do not change.
    pub fn force(&mut self, window: usize, chunk: usize) {
        let chunk = chunk.next_multiple_of(4).max(4);
        let Ok(inner) = self.inner.get_mut(self.place) else { return };
        let layout = inner.arena.layout.rewindowed(window).filter(|_| inner.arena.is_unallocated());
        if let Some(layout) = layout {
            inner.arena.layout = layout;
            inner.staging = Staging::new(4 * window.max(super::arena::ALIGN));
            self.chunk = chunk;
        }
    }

    /// For tests: loses the device, as a driver's reset would.
    pub fn force_loss(&self) {
        if let Ok(inner) = self.inner.get(self.place) {
            inner.context.force_loss();
        }
    }

    /// Registers parameters. On an error nothing has changed.
    pub fn add(&mut self, params: &[ParamInfo]) -> Result<()> {
        let (place, rule, chunk) = (self.place, self.rule, self.chunk);
        let inner = self.inner.get_mut(place)?;
        let mut layout = inner.arena.layout.clone();
        for (i, info) in params.iter().enumerate() {
            let label = || info.label(self.params.len() + i);
            refuse_wide(place, label, info.dtype)?;
            let elements = info.shape.iter().try_fold(info.dtype.parts(), |n, &axis| n.checked_mul(axis));
            let too_large = || {
                let (allowed, got) = ("of a size that memory can hold", format!("{:?}", info.shape));
                Error::refuse(ErrorKind::Value, place, label(), allowed, got)
            };
            let elements = elements.ok_or_else(too_large)?;
            match rule {
                Kind::Elementwise(_) => layout.push(info.dtype.part(), elements).ok_or_else(too_large)?,
                Kind::Tensor(rule) => push_whole(place, label, rule, &mut layout, info, chunk)?,
            }
        }
        inner.arena.layout = layout;
        self.params.extend(params.iter().map(|info| Param {
            len: info.reals(),
            form: Form::new(&info.shape, chunk),
            dtype: info.dtype.part(),
            resident: info.resident,
            present: SlotSet::EMPTY,
            used: SlotSet::EMPTY,
            host_newer: true,
            device_newer: false,
            lost: false,
            summed: false,
        }));
        Ok(())
    }

    /// Forgets the parameters that were added last, but so many.
    pub fn truncate(&mut self, count: usize) -> Result<()> {
        self.params.truncate(count);
        self.inner.get_mut(self.place)?.arena.layout.truncate(count);
        Ok(())
    }

    /// Makes the memory that steps will need, with these slots of each parameter. On an error nothing has changed.
    pub fn reserve(&mut self, slots: &[SlotSet]) -> Result<()> {
        let reserved = self.reserve_once(slots);
        self.noting(reserved)
    }

    fn reserve_once(&mut self, slots: &[SlotSet]) -> Result<()> {
        let inner = self.inner.get_mut(self.place)?;
        let layout = &inner.arena.layout;
        let mut wanted = BTreeSet::new();
        for (index, slots) in slots.iter().enumerate() {
            for segment in layout.segments(index, usize::MAX) {
                let roles = [Role::Parameter, Role::Gradient(self.params[index].dtype)];
                let slots = slots.iter().chain(bound_slots(self.rule)).map(Role::Slot);
                wanted.extend(roles.into_iter().chain(slots).map(|role| (role, segment.window)));
            }
            for k in slots.iter() {
                wanted.extend(layout.slot_segments(index, k, usize::MAX).map(|s| (Role::Slot(k), s.window)));
            }
        }
        inner.arena.ensure(&inner.context, self.place, &wanted)?;
        inner.ensure_scratch(self.place, self.rule, &self.params)
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

    /// Notes when an error says that what lies on the device is not known any more.
    fn noting<T>(&mut self, outcome: Result<T>) -> Result<T> {
        let outcome =
            outcome.map_err(|error| match self.inner.get(self.place).map(|inner| inner.context.check(self.place)) {
                // Whatever fails on a lost device is its loss.
                Ok(Err(loss)) if loss.kind() == ErrorKind::DeviceLost => loss,
                _ => error,
            });
        if matches!(&outcome, Err(e) if e.kind() == ErrorKind::DeviceLost) {
            self.broken = true;
            for param in self.params.iter_mut().filter(|param| param.device_newer) {
                (param.lost, param.device_newer) = (true, false);
            }
        }
        outcome
    }

    /// Copies of slots, each named by its parameter's index and k, brought home together.
    pub fn read_slots(&mut self, wanted: &[(usize, usize)]) -> Result<Vec<Option<Vec<u8>>>> {
        let inner = self.inner.get(self.place)?;
        let exists = |&&(index, k): &&(usize, usize)| self.has_slot(index, k);
        let sources: Vec<_> = wanted.iter().filter(exists).copied().collect();
        let bytes = |&(index, k): &(usize, usize)| vec![0; 4 * inner.arena.layout.slot_len(index, k)];
        let mut found: Vec<Vec<u8>> = sources.iter().map(bytes).collect();
        let read = inner.read_slots(self.place, &sources, &mut found);
        self.noting(read)?;
        let mut found = found.into_iter();
        Ok(wanted.iter().map(|&(index, k)| self.has_slot(index, k).then(|| found.next()).flatten()).collect())
    }

    /// Replaces every slot of every parameter: by parameter and slot the bytes in C order, or `None` where
    /// there is no slot. On an error other than [`ErrorKind::DeviceLost`] nothing has changed. A device that was
    /// lost is opened again.
    pub fn replace_slots(&mut self, slots: &[Vec<Option<&[u8]>>]) -> Result<()> {
        let whole = self.inner.get(self.place)?.context.check(self.place);
        let known = self.noting(whole);
        if self.broken {
            self.recover()?;
        } else {
            known?;
        }
        let replaced = self.replace_slots_once(slots);
        self.noting(replaced)
    }

    fn replace_slots_once(&mut self, slots: &[Vec<Option<&[u8]>>]) -> Result<()> {
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
            assert_eq!(bytes.len(), 4 * arena.layout.slot_len(index, k), "a slot has the length of its shape");
            wanted.extend(arena.layout.slot_segments(index, k, usize::MAX).map(|s| (Role::Slot(k), s.window)));
        }
        arena.ensure(context, place, &wanted)?;
        let mut uploads = Vec::new();
        for (index, k, bytes) in given() {
            for segment in arena.layout.slot_segments(index, k, staging.longest()) {
                let source = Source::Bytes(&bytes[4 * segment.start..][..4 * segment.len]);
                uploads.push(upload(place, arena, Role::Slot(k), segment, source)?);
            }
        }
        let encoder = context.device.create_command_encoder(&Default::default());
        let encoder = staging.upload(context, place, None, &uploads, encoder)?;
        submit(context, place, encoder)?;
        for (param, slots) in self.params.iter_mut().zip(slots) {
            let given = slots.iter().enumerate().filter(|(_, slot)| slot.is_some());
            param.present = given.fold(SlotSet::EMPTY, |set, (k, _)| set.with(k));
            param.used = param.used.union(param.present);
        }
        Ok(())
    }

    /// Begins anew on the device, or on another one that fits the request. Values of resident parameters that were
    /// there alone must be given again.
    fn recover(&mut self) -> Result<()> {
        let inner = self.inner.get_mut(self.place)?;
        let (mut new, layout) = (Inner::on(Context::shared(self.place, &self.request)?), inner.arena.layout.clone());
        // The window of the new device may be another one, but for a test's.
        new.arena.layout = if layout.is_of(inner.context.window_elements()) {
            let fitting = layout.rewindowed(new.context.window_elements());
            fitting.ok_or_else(|| {
                let allowed = "a device that holds every parameter in one binding";
                Error::refuse(ErrorKind::Device, self.place, "the GPU", allowed, &new.context.info.name)
            })?
        } else {
            layout
        };
        new.staging = inner.staging.anew();
        *inner = new;
        for param in &mut self.params {
            (param.present, param.used) = (SlotSet::EMPTY, SlotSet::EMPTY);
            (param.host_newer, param.device_newer, param.summed) = (true, false, false);
        }
        self.broken = false;
        Ok(())
    }

    /// Whether the device's value of a parameter is ahead of the host's, or was and is lost.
    pub fn host_is_stale(&self, index: usize) -> bool {
        self.params[index].device_newer || self.params[index].lost
    }

    /// The host's value of a resident parameter becomes the truth.
    pub fn host_written(&mut self, index: usize) {
        let param = &mut self.params[index];
        (param.host_newer, param.device_newer, param.lost) = (true, false, false);
    }

    fn lost(&self, place: &str, label: &str) -> Error {
        Error::plain(ErrorKind::DeviceLost, format!("{place}: {label} was lost with the device"))
            .with_remedy("assign the parameter's values and call load_state_dict, both from one checkpoint")
    }

    /// Refuses parameters whose values were lost, by name.
    pub fn refuse_lost(&self, place: &str, label: impl Fn(usize) -> String) -> Result<()> {
        match self.params.iter().position(|param| param.lost) {
            Some(index) => Err(self.lost(place, &label(index))),
            None => Ok(()),
        }
    }

    /// Brings parameters' values to the host's arrays where the device's are ahead. Each array must be of its
    /// parameter's length and dtype.
    pub fn sync(
        &mut self,
        place: &str,
        arrays: &mut [(usize, &mut TensorMut<'_>)],
        pool: Option<&ThreadPool>,
        label: impl Fn(usize) -> String,
    ) -> Result<()> {
        let inner = self.inner.get(self.place)?;
        if let Some(&(index, _)) = arrays.iter().find(|(index, _)| self.params[*index].lost) {
            return Err(self.lost(place, &label(index)));
        }
        let stale: Vec<&(usize, &mut TensorMut<'_>)> =
            arrays.iter().filter(|(index, _)| self.params[*index].device_newer).collect();
        if stale.is_empty() {
            return Ok(());
        }
        let read = || {
            let mut downloads = Vec::new();
            for (index, array) in &stale {
                let raw = fitting(&array.raw, &self.params[*index]);
                let segments = inner.arena.layout.segments(*index, inner.staging.longest());
                downloads.extend(
                    segments.map(|segment| home(place, &inner.arena, segment, raw)).collect::<Result<Vec<_>>>()?,
                );
            }
            let encoder = inner.context.device.create_command_encoder(&Default::default());
            inner.staging.download(&inner.context, place, pool, encoder, downloads)
        };
        let read = read();
        self.noting(read)?;
        for (index, _) in arrays {
            self.params[*index].device_newer = false;
        }
        Ok(())
    }

    /// One update of the jobs' parameters. `params` and `gradients` are by parameter index, of the
    /// parameters' lengths and dtype. On an error other than [`ErrorKind::DeviceLost`] nothing has changed.
    pub fn step(
        &mut self,
        bounds: &Bounds,
        rows: &[Row],
        jobs: &[Job],
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
        pool: Option<&ThreadPool>,
    ) -> Result<Outcome> {
        let stepped = self.step_once(bounds, rows, jobs, params, gradients, pool);
        self.noting(stepped)
    }

    fn step_once(
        &mut self,
        bounds: &Bounds,
        rows: &[Row],
        jobs: &[Job],
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
        pool: Option<&ThreadPool>,
    ) -> Result<Outcome> {
        let (place, rule, chunk) = (self.place, self.rule, self.chunk);
        let inner = self.inner.get_mut(place)?;
        inner.context.check(place)?;
        let states = &self.params;
        let mut origins = Vec::with_capacity(jobs.len());
        for job in jobs {
            if let Some(gradient) = &gradients[job.index] {
                origins.push((*job, inner.origin(place, gradient)?));
            }
        }
        inner.prepare(Fixed { place, rule, chunk }, rows.len(), &origins, gradients, states, bounds.looks())?;
        let Inner { context, arena, staging, work, plans, in_flight, pending, .. } = inner;
        let (Some(work), Some(plan)) = (work.as_ref(), plans.front()) else { unreachable!("prepared") };
        let words = bounds.words(plan.owners.len() as u32);
        let words = words.into_iter().chain(rows.iter().flat_map(row_words));
        let work_bytes = words.flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
        let mut uploads =
            vec![Upload { target: work, offset: 0, bytes: work_bytes.len(), source: Source::Bytes(&work_bytes) }];
        let mut encoder = context.device.create_command_encoder(&Default::default());
        for &(job, origin) in &origins {
            let state = &states[job.index];
            if !state.resident || state.host_newer {
                let raw = fitting(&params[job.index].raw, state);
                push_array(place, arena, staging, &mut uploads, Role::Parameter, job.index, raw)?;
            }
            if let (Origin::Arena(dtype), Some(gradient)) = (origin, &gradients[job.index]) {
                match Array::of(gradient) {
                    Some(array) => copy_array(place, arena, &mut encoder, array, job.index)?,
                    None => {
                        let role = Role::Gradient(dtype);
                        push_array(place, arena, staging, &mut uploads, role, job.index, &gradient.raw)?;
                    }
                }
            }
        }
        let mut downloads = Vec::new();
        for job in jobs.iter().filter(|job| !states[job.index].resident) {
            let raw = &params[job.index].raw;
            for segment in arena.layout.segments(job.index, staging.longest()) {
                downloads.push(home(place, arena, segment, raw)?);
            }
        }
        let mut encoder = staging.upload(context, place, pool, &uploads, encoder)?;
        for job in jobs {
            for k in job.fresh.intersection(states[job.index].used).iter() {
                for segment in arena.layout.slot_segments(job.index, k, usize::MAX) {
                    let role = Role::Slot(k);
                    let buffer = arena.buffer(place, role, segment.window)?;
                    encoder.clear_buffer(buffer, segment.offset(role), Some(segment.padded(role) as u64));
                }
            }
        }
        if let Some(guard) = plan.guard.as_ref().filter(|_| bounds.looks()) {
            guard.record(context, &mut encoder);
        }
        Dispatch::record(context, &mut encoder, &plan.updates);
        make_room(context, place, in_flight)?;
        point();
        let mut verdict = [0; 4 * CONTROL_WORDS];
        let waits = !downloads.is_empty();
        let mut ticket = None;
        if bounds.skips && waits {
            let sink = Sink::Bytes(verdict.as_mut_slice());
            downloads.push(Download { source: work, offset: 0, bytes: 4 * CONTROL_WORDS, sink });
        } else if bounds.skips {
            ticket = Some(Ticket::record(context, place, &mut encoder, work, 4 * CONTROL_WORDS)?);
        }
        let index = staging.download(context, place, pool, encoder, downloads)?;
        for job in jobs {
            let param = &mut self.params[job.index];
            param.present = param.present.union(job.fresh);
            param.used = param.used.union(job.fresh);
            param.host_newer = !param.resident;
            param.device_newer = param.resident;
        }
        for (job, _) in origins.iter().filter(|(_, origin)| *origin == Origin::Sum) {
            self.params[job.index].summed = false;
        }
        if let Some(ticket) = ticket {
            *pending = Some(Pending { ticket: ticket.submitted(index), jobs: jobs.to_vec() });
            return Ok(Outcome::Pending);
        }
        if !waits {
            in_flight.push_back(index);
        }
        if bounds.skips && Finding::read(&verdict).skipped {
            self.take_back(jobs);
            return Ok(Outcome::Skipped);
        }
        Ok(Outcome::Applied)
    }

    /// Slots that were made for an update that was left out.
    fn take_back(&mut self, jobs: &[Job]) {
        for job in jobs {
            let param = &mut self.params[job.index];
            param.present = param.present.without(job.fresh);
        }
    }

    /// Waits for a step whose end is not known; whether its update was left out.
    pub fn settle(&mut self) -> Result<bool> {
        let place = self.place;
        let inner = self.inner.get_mut(place)?;
        let Some(Pending { ticket, jobs }) = inner.pending.take() else { return Ok(false) };
        let waited = ticket.wait(&inner.context, place);
        let bytes = self.noting(waited)?;
        let skipped = Finding::read(&bytes).skipped;
        if skipped {
            self.take_back(&jobs);
        }
        Ok(skipped)
    }

    /// The 2-norm of the last step's gradients within their bound; waits for it.
    pub fn gradient_norm(&mut self) -> Result<Option<f64>> {
        let inner = self.inner.get(self.place)?;
        let Some(work) = &inner.work else { return Ok(None) };
        let mut bytes = [0; 4 * CONTROL_WORDS];
        let read = inner.read_buffer(self.place, work, &mut bytes);
        self.noting(read)?;
        Ok(Some(Finding::read(&bytes).norm))
    }

    /// The first parameter of the last step whose gradient was not finite.
    pub fn culprit(&mut self) -> Result<Option<Culprit>> {
        let inner = self.inner.get(self.place)?;
        let Some((plan, guard)) = inner.plans.front().and_then(|plan| Some((plan, plan.guard.as_ref()?))) else {
            return Ok(None);
        };
        let mut bytes = vec![0; guard.partials().size() as usize];
        let read = inner.read_buffer(self.place, guard.partials(), &mut bytes);
        let mut found: BTreeMap<usize, u32> = BTreeMap::new();
        for (&owner, flags) in plan.owners.iter().zip(GuardPasses::found(&bytes)).filter(|(_, flags)| *flags != 0) {
            *found.entry(owner).or_default() |= flags;
        }
        self.noting(read)?;
        let first = found.into_iter().next();
        Ok(first.map(|(index, flags)| Culprit { index, is_nan: flags & HAS_NAN != 0 }))
    }

    /// Adds gradients to the sums of the next step that has none of its own. On an error other than
    /// [`ErrorKind::DeviceLost`] nothing has changed.
    pub fn accumulate(&mut self, gradients: &[Option<TensorRef<'_>>], pool: Option<&ThreadPool>) -> Result<()> {
        let added = self.accumulate_once(gradients, pool);
        self.noting(added)
    }

    fn accumulate_once(&mut self, gradients: &[Option<TensorRef<'_>>], pool: Option<&ThreadPool>) -> Result<()> {
        let (place, chunk) = (self.place, self.chunk);
        let inner = self.inner.get_mut(place)?;
        inner.context.check(place)?;
        let mut items = Vec::new();
        for (index, gradient) in gradients.iter().enumerate() {
            if let Some(gradient) = gradient {
                let row = usize::from(self.params[index].summed);
                items.push(Item { index, row, entry: "", origin: inner.origin(place, gradient)? });
            }
        }
        let (wanted, tables) = inner.tables(place, chunk, &items, gradients)?;
        let sums = tables.keys().map(|key| (Role::Sum, key.window));
        let wanted = wanted.into_iter().filter(|(role, _)| *role != Role::Parameter).chain(sums).collect();
        inner.arena.ensure(&inner.context, place, &wanted)?;
        let mut dispatches = Vec::new();
        for (key, (table, _)) in &tables {
            let dtype = key.origin.dtype();
            let pipeline = inner.context.pipeline(place, &format!("sum_into {dtype}"), || shader::sum_into(dtype))?;
            let sums = inner.arena.buffer(place, Role::Sum, key.window)?;
            let addends = inner.gradient_buffer(place, *key, gradients)?;
            dispatches.push(inner.context.scoped(place, || {
                let buffer = table.buffer(&inner.context, place, 0)?;
                Ok(Dispatch::new(&inner.context, "sum_into", pipeline, &[sums, addends, &buffer], table.len()))
            })?);
        }
        let Inner { context, arena, staging, in_flight, .. } = inner;
        let mut encoder = context.device.create_command_encoder(&Default::default());
        let mut uploads = Vec::new();
        for item in &items {
            if let (Origin::Arena(dtype), Some(gradient)) = (item.origin, &gradients[item.index]) {
                match Array::of(gradient) {
                    Some(array) => copy_array(place, arena, &mut encoder, array, item.index)?,
                    None => {
                        let role = Role::Gradient(dtype);
                        push_array(place, arena, staging, &mut uploads, role, item.index, &gradient.raw)?;
                    }
                }
            }
        }
        let mut encoder = staging.upload(context, place, pool, &uploads, encoder)?;
        Dispatch::record(context, &mut encoder, &dispatches);
        make_room(context, place, in_flight)?;
        in_flight.push_back(submit(context, place, encoder)?);
        for item in items {
            self.params[item.index].summed = true;
        }
        Ok(())
    }

    /// Whether gradients of a parameter were added up for the next step.
    pub fn has_sum(&self, index: usize) -> bool {
        self.params[index].summed
    }

    /// Forgets sums of gradients.
    pub fn clear_sums(&mut self) {
        self.params.iter_mut().for_each(|param| param.summed = false);
    }
}

/// What is the same in every step.
#[derive(Clone, Copy)]
struct Fixed {
    place: &'static str,
    rule: Kind,
    /// Elements of a chunk.
    chunk: usize,
}

/// One tensor's part in some dispatch.
#[derive(Debug, Clone, Copy)]
struct Item {
    index: usize,
    row: usize,
    entry: &'static str,
    origin: Origin,
}

/// What one dispatch works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    entry: &'static str,
    window: Window,
    origin: Origin,
}

impl Origin {
    fn dtype(self) -> Dtype {
        match self {
            Self::Arena(dtype) | Self::Array { dtype, .. } => dtype,
            Self::Sum => Dtype::F32,
        }
    }
}

/// A stretch of one tensor in one dispatch.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    key: Key,
    /// First element in the window.
    at: usize,
    /// First element in the bound gradients.
    gradient_at: usize,
    len: usize,
}

/// Tables by dispatch, with the parameter of each chunk.
type Tables = BTreeMap<Key, (Table, Vec<usize>)>;

impl Inner {
    /// Where a gradient will be read from.
    fn origin(&self, place: &str, gradient: &TensorRef<'_>) -> Result<Origin> {
        let dtype = gradient.raw.dtype;
        if is_sum(gradient) {
            return Ok(Origin::Sum);
        }
        let Some(array) = Array::of(gradient) else { return Ok(Origin::Arena(dtype)) };
        let context = array.context(place)?;
        if !Arc::ptr_eq(context, &self.context) {
            let lost = context.check(place).is_err();
            let got =
                if lost { "one of a device that was lost".into() } else { format!("one on {}", context.info.name) };
            return Err(Error::refuse(ErrorKind::Value, place, "a gradient", "on the optimizer's device", got)
                .with_remedy("make it there with roptim.gpu.array"));
        }
        let worth = gradient.raw.len >= WORTH_A_DISPATCH;
        Ok(if worth { Origin::Array { id: array.id(), buffer: 0, dtype } } else { Origin::Arena(dtype) })
    }

    /// Makes the working memory of a tensor rule's passes over these parameters.
    fn ensure_scratch(&mut self, place: &str, rule: Kind, params: &[Param]) -> Result<()> {
        let Some(program) = rule.program() else { return Ok(()) };
        let layout = &self.arena.layout;
        let mut sums: BTreeMap<Window, [usize; MAX_AREAS]> = BTreeMap::new();
        for (index, param) in params.iter().enumerate() {
            for segment in layout.segments(index, usize::MAX) {
                let sum = sums.entry(segment.window).or_default();
                sum.iter_mut().zip(program::words(program, &param.form)).for_each(|(sum, words)| *sum += words);
            }
        }
        // Whichever tensors go together, they need no more than a window and no more than all.
        let most = |k: usize| sums.values().map(|sum| sum[k].min(layout.window())).max().unwrap_or(0);
        if self.scratch.ensure(&self.context, place, program.areas, std::array::from_fn(most))? {
            self.plans.clear();
        }
        Ok(())
    }

    /// Windows and chunk tables of some tensors.
    fn tables(
        &self,
        place: &str,
        chunk: usize,
        items: &[Item],
        gradients: &[Option<TensorRef<'_>>],
    ) -> Result<(BTreeSet<(Role, Window)>, Tables)> {
        let (mut wanted, mut tables) = (BTreeSet::new(), Tables::new());
        for item in items {
            for stretch in self.stretches(place, item, gradients)? {
                let Key { window, origin, .. } = stretch.key;
                wanted.insert((Role::Parameter, window));
                match origin {
                    Origin::Array { .. } => false,
                    Origin::Sum => wanted.insert((Role::Sum, window)),
                    Origin::Arena(dtype) => wanted.insert((Role::Gradient(dtype), window)),
                };
                let (table, owners): &mut (Table, Vec<usize>) = tables.entry(stretch.key).or_default();
                table.push(chunk, stretch.at, stretch.gradient_at, stretch.len, item.row);
                owners.resize(table.len() as usize, item.index);
            }
        }
        Ok((wanted, tables))
    }

    /// Where a tensor and its gradient lie.
    fn stretches(&self, place: &str, item: &Item, gradients: &[Option<TensorRef<'_>>]) -> Result<Vec<Stretch>> {
        let array = gradients[item.index].as_ref().and_then(Array::of);
        let mut stretches = Vec::new();
        for Segment { window, at, start, len } in self.arena.layout.segments(item.index, usize::MAX) {
            let mut push = |origin, at, gradient_at, len| {
                stretches.push(Stretch { key: Key { entry: item.entry, window, origin }, at, gradient_at, len });
            };
            match (item.origin, array) {
                (Origin::Array { id, dtype, .. }, Some(array)) => {
                    for piece in array.pieces(place, start, len)? {
                        let origin = Origin::Array { id, buffer: piece.buffer, dtype };
                        push(origin, at + (piece.start - start), piece.at, piece.len);
                    }
                }
                (origin, _) => push(origin, at, at, len),
            }
        }
        Ok(stretches)
    }

    /// The gradients of a dispatch.
    fn gradient_buffer<'a>(
        &'a self,
        place: &str,
        key: Key,
        gradients: &'a [Option<TensorRef<'_>>],
    ) -> Result<&'a wgpu::Buffer> {
        match key.origin {
            Origin::Arena(dtype) => self.arena.buffer(place, Role::Gradient(dtype), key.window),
            Origin::Sum => self.arena.buffer(place, Role::Sum, key.window),
            Origin::Array { id, buffer, .. } => {
                let found = gradients.iter().flatten().filter_map(Array::of).find(|array| array.id() == id);
                let gone = || Error::plain(ErrorKind::Internal, format!("{place}: an array is gone"));
                found.ok_or_else(gone)?.buffer(place, buffer)
            }
        }
    }

    /// Memory, coefficient rows and dispatches for the jobs; kept from an earlier step where they fit. Their plan
    /// becomes the first.
    fn prepare(
        &mut self,
        Fixed { place, rule, chunk }: Fixed,
        rows: usize,
        jobs: &[(Job, Origin)],
        gradients: &[Option<TensorRef<'_>>],
        params: &[Param],
        looks: bool,
    ) -> Result<()> {
        let work_bytes = 4 * (CONTROL_WORDS + ROW_WORDS * rows) as u64;
        if self.work.as_ref().is_none_or(|work| work.size() < work_bytes) {
            let bytes = work_bytes.next_power_of_two().max(1024);
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
            self.work = Some(self.context.scoped(place, || Ok(self.context.buffer("work", bytes, usage, false)))?);
            self.plans.clear();
        }
        let fits = |plan: &Plan| plan.is_of(jobs, self.arena.generation) && (plan.guard.is_some() || !looks);
        if let Some(found) = self.plans.iter().position(fits) {
            if let Some(plan) = self.plans.remove(found) {
                self.plans.push_front(plan);
            }
            return Ok(());
        }
        let items = jobs.iter().map(|(job, origin)| Item {
            index: job.index,
            row: job.row,
            entry: job.kernel.entry,
            origin: *origin,
        });
        let items: Vec<Item> = items.collect();
        let (mut wanted, tables) = self.tables(place, chunk, &items, gradients)?;
        let kernels: BTreeMap<&str, KernelFacts> = jobs.iter().map(|(job, _)| (job.kernel.entry, job.kernel)).collect();
        for key in tables.keys() {
            wanted.extend(kernels[key.entry].slots.iter().map(|&k| (Role::Slot(k), key.window)));
        }
        for (job, _) in jobs {
            for &k in job.kernel.slots {
                let segments = self.arena.layout.slot_segments(job.index, k, usize::MAX);
                wanted.extend(segments.map(|segment| (Role::Slot(k), segment.window)));
            }
        }
        self.arena.ensure(&self.context, place, &wanted)?;
        self.ensure_scratch(place, rule, params)?;
        let mut members: BTreeMap<Key, Vec<Member>> = BTreeMap::new();
        if rule.program().is_some() {
            for (item, (job, _)) in items.iter().zip(jobs) {
                let (slots, form) = (self.arena.layout.slots_at(item.index), params[item.index].form);
                for Stretch { key, at, gradient_at, .. } in self.stretches(place, item, gradients)? {
                    let member = Member { at, gradient_at, row: item.row, slots, form, turns: job.turns };
                    members.entry(key).or_default().push(member);
                }
            }
        }
        let Some(work) = &self.work else { unreachable!("made above") };
        let (mut updates, mut owners, mut measured) = (Vec::new(), Vec::new(), Vec::new());
        for (key, (table, of_chunks)) in &tables {
            let kernel = &kernels[key.entry];
            let (parameter, gradient) = (key.window.parameter, key.origin.dtype());
            let rule = match rule {
                Kind::Elementwise(rule) => rule,
                Kind::Tensor(rule) => {
                    let gradients = self.gradient_buffer(place, *key, gradients)?;
                    let bound = Bound { window: key.window, gradients, gradient, work };
                    for members in program::batches(rule.program(), &members[key], self.arena.layout.window()) {
                        let memory = (&self.arena, &self.scratch);
                        updates.extend(program::dispatches(&self.context, place, rule, memory, bound, members)?);
                    }
                    if looks {
                        let first = owners.len() as u32;
                        let chunks = self.context.scoped(place, || table.buffer(&self.context, place, first))?;
                        measured.push((gradient, gradients, chunks, table.len()));
                    }
                    owners.extend(of_chunks);
                    continue;
                }
            };
            let name = format!("{} {parameter} {gradient}", kernel.entry);
            let make = || shader::update(rule, kernel, parameter, gradient);
            let pipeline = self.context.pipeline(place, &name, make)?;
            let parameters = self.arena.buffer(place, Role::Parameter, key.window)?;
            let gradients = self.gradient_buffer(place, *key, gradients)?;
            let slots = kernel.slots.iter().map(|&k| self.arena.buffer(place, Role::Slot(k), key.window));
            let slots = slots.collect::<Result<Vec<_>>>()?;
            let (update, chunks) = self.context.scoped(place, || {
                let chunks = table.buffer(&self.context, place, owners.len() as u32)?;
                let buffers: Vec<_> = [parameters, gradients, &chunks, work].into_iter().chain(slots).collect();
                Ok((Dispatch::new(&self.context, kernel.entry, pipeline, &buffers, table.len()), chunks))
            })?;
            updates.push(update);
            measured.push((gradient, gradients, chunks, table.len()));
            owners.extend(of_chunks);
        }
        let guard = if looks && !measured.is_empty() {
            let tables: Vec<_> = measured.iter().map(|(dtype, g, table, n)| (*dtype, *g, table, *n)).collect();
            Some(GuardPasses::new(&self.context, place, work, &tables, owners.len() as u32)?)
        } else {
            None
        };
        let plan = Plan { jobs: jobs.to_vec(), generation: self.arena.generation, updates, guard, owners };
        let (generation, has_arrays) = (self.arena.generation, plan.has_arrays());
        // A plan keeps the arrays it was made for in memory: one of those is enough.
        self.plans.retain(|old| old.generation == generation && !(has_arrays && old.has_arrays()));
        self.plans.truncate(PLANS - 1);
        self.plans.push_front(plan);
        Ok(())
    }

    /// Reads slots, in order, to memory of their length.
    fn read_slots(&self, place: &str, sources: &[(usize, usize)], found: &mut [Vec<u8>]) -> Result<()> {
        let mut downloads = Vec::new();
        for (&(index, k), bytes) in sources.iter().zip(found) {
            let mut rest = bytes.as_mut_slice();
            for segment in self.arena.layout.slot_segments(index, k, self.staging.longest()) {
                let (part, behind) = rest.split_at_mut(4 * segment.len);
                rest = behind;
                downloads.push(download(place, &self.arena, Role::Slot(k), segment, Sink::Bytes(part))?);
            }
        }
        self.context.check(place)?;
        if downloads.is_empty() {
            return Ok(());
        }
        let encoder = self.context.device.create_command_encoder(&Default::default());
        self.staging.download(&self.context, place, None, encoder, downloads).map(|_| ())
    }

    /// Reads a buffer's first bytes.
    fn read_buffer(&self, place: &str, source: &wgpu::Buffer, into: &mut [u8]) -> Result<()> {
        let download = Download { source, offset: 0, bytes: into.len(), sink: Sink::Bytes(into) };
        let encoder = self.context.device.create_command_encoder(&Default::default());
        self.staging.download(&self.context, place, None, encoder, vec![download]).map(|_| ())
    }
}

/// Waits for the oldest submissions, so that one more may follow.
fn make_room(context: &Context, place: &str, in_flight: &mut VecDeque<wgpu::SubmissionIndex>) -> Result<()> {
    while in_flight.len() >= IN_FLIGHT {
        let poll = wgpu::PollType::Wait { submission_index: in_flight.pop_front(), timeout: None };
        context.device.poll(poll).map_err(|e| unmapped(place, e))?;
    }
    Ok(())
}

/// The array, which must be of the parameter's length and dtype.
fn fitting<'a>(raw: &'a RawTensor, param: &Param) -> &'a RawTensor {
    assert!((raw.len, raw.dtype) == (param.len, param.dtype), "the optimizer compares lengths and dtypes first");
    raw
}

/// The slots that every pass of a tensor rule binds, whether or not a tensor has them.
fn bound_slots(rule: Kind) -> std::ops::Range<usize> {
    match rule {
        Kind::Elementwise(_) => 0..0,
        Kind::Tensor(rule) => 0..rule.declaration().slots.len(),
    }
}

/// Adds a tensor of a tensor rule, which passes must reach whole.
fn push_whole(
    place: &str,
    label: impl Fn() -> String,
    rule: TensorRuleId,
    layout: &mut Layout,
    info: &ParamInfo,
    chunk: usize,
) -> Result<()> {
    let refuse = |allowed: String, got: String| {
        let error = Error::refuse(ErrorKind::Value, place, label(), allowed, got);
        Err(error.with_remedy("use backend=\"cpu\" for it"))
    };
    let len = |k: usize| rule.slot_shape(k, &info.shape).map_or(0, |shape| shape.iter().product());
    let (most, elements) = (layout.window(), info.reals());
    if elements > most {
        return refuse(format!("of at most {most} elements on this GPU"), elements.to_string());
    }
    let words = program::words(rule.program(), &Form::new(&info.shape, chunk));
    let most_words = words.into_iter().max().unwrap_or(0);
    if most_words > most {
        let got = format!("shape {}, which needs {}", shape_text(&info.shape), 4 * most_words);
        return refuse(format!("of at most {} bytes of working memory on this GPU", 4 * most), got);
    }
    match layout.push_whole(info.dtype.part(), elements, std::array::from_fn(len)) {
        Some(()) => Ok(()),
        None => refuse(format!("of slots of at most {most} elements on this GPU"), shape_text(&info.shape)),
    }
}

fn upload<'a>(place: &str, arena: &'a Arena, role: Role, segment: Segment, source: Source<'a>) -> Result<Upload<'a>> {
    let target = arena.buffer(place, role, segment.window)?;
    Ok(Upload { target, offset: segment.offset(role), bytes: segment.padded(role), source })
}

fn download<'a>(place: &str, arena: &'a Arena, role: Role, segment: Segment, sink: Sink<'a>) -> Result<Download<'a>> {
    let source = arena.buffer(place, role, segment.window)?;
    Ok(Download { source, offset: segment.offset(role), bytes: segment.padded(role), sink })
}

/// The way home of part of a parameter.
fn home<'a>(place: &str, arena: &'a Arena, segment: Segment, raw: &'a RawTensor) -> Result<Download<'a>> {
    // SAFETY: TensorMut promises writable memory for its elements, whose number was compared; segments lie within the
    // parameter and are disjoint, and nothing else touches it in this call.
    let sink = Sink::Array(unsafe { Part::new(raw, segment.start, segment.len) });
    download(place, arena, Role::Parameter, segment, sink)
}

/// Adds the uploads of an array.
fn push_array<'a>(
    place: &str,
    arena: &'a Arena,
    staging: &Staging,
    uploads: &mut Vec<Upload<'a>>,
    role: Role,
    index: usize,
    raw: &'a RawTensor,
) -> Result<()> {
    for segment in arena.layout.segments(index, staging.longest()) {
        // SAFETY: TensorMut and TensorRef promise memory for their elements, whose number the optimizer compared with
        // the parameter's; the segment lies within it.
        let source = Source::Array(unsafe { Part::new(raw, segment.start, segment.len) });
        uploads.push(upload(place, arena, role, segment, source)?);
    }
    Ok(())
}

/// Records a copy of an array on the device to its place among the gradients.
fn copy_array(
    place: &str,
    arena: &Arena,
    encoder: &mut wgpu::CommandEncoder,
    array: &Array,
    index: usize,
) -> Result<()> {
    let (role, size) = (Role::Gradient(array.dtype()), array.dtype().size());
    for segment in arena.layout.segments(index, usize::MAX) {
        let target = arena.buffer(place, role, segment.window)?;
        for piece in array.pieces(place, segment.start, segment.len)? {
            let to = segment.offset(role) + ((piece.start - segment.start) * size) as u64;
            let bytes = (piece.len.next_multiple_of(super::arena::ALIGN) * size) as u64;
            let source = array.buffer(place, piece.buffer)?;
            encoder.copy_buffer_to_buffer(source, (piece.at * size) as u64, target, to, bytes);
        }
    }
    Ok(())
}

/// A coefficient row as the shader's struct `Row`: every f64 rounded once to f32, as on the CPU.
fn row_words(row: &Row) -> [u32; ROW_WORDS] {
    let frame = Frame::<f32>::new(&row.shared);
    let l2 = if frame.l2.is_some() { L2 } else { 0 };
    let flush = if row.shared.flush_subnormals { FLUSH_SUBNORMALS } else { 0 };
    let [factor, decay, shrink] = [frame.gradient_factor, frame.l2.unwrap_or(0.0), frame.shrink].map(f32::to_bits);
    let mut words = [0; ROW_WORDS];
    let (head, coefficients) = words.split_at_mut(FRAME_WORDS);
    head.copy_from_slice(&[factor, decay, shrink, l2 | flush]);
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
        let request = DeviceRequest { allow_software: true, alone: true, ..DeviceRequest::default() };
        let context = match Context::shared("Adam", &request) {
            Err(e) if e.kind() == ErrorKind::NoAdapter => {
                assert!(std::env::var("ROPTIM_REQUIRE_GPU").as_deref() != Ok("1"), "{e}");
                return None;
            }
            context => context.unwrap(),
        };
        let mut executor = Executor::on(context, "Adam", Kind::Elementwise(RuleId::Adam), request);
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
        let job = Job { index: 0, row: 0, kernel: RuleId::Adam.kernels()[0], turns: 0, fresh };
        let mut params = [w.as_mut_slice().into()];
        let rows = [Row { shared, coefficients }];
        let gradients = [Some(g.as_slice().into())];
        executor.step(&Bounds::NONE, &rows, &[job], &mut params, &gradients, None).map(|_| ())
    }

    #[test]
    fn padding_stays_zero() {
        let Some(mut executor) = executor() else { return };
        let mut w = [1.0, 2.0, 3.0];
        step(&mut executor, &mut w, [1.0, 0.0, 4.0]).unwrap();
        assert!(w[1].is_nan() && w[0] == 2.0);
        let inner = executor.inner.get("").unwrap();
        let window = Window { parameter: Dtype::F32, index: 0 };
        for role in [Role::Parameter, Role::Gradient(Dtype::F32), Role::Slot(0), Role::Slot(1)] {
            let mut bytes = vec![1; 4 * super::super::arena::ALIGN];
            inner.read_buffer("", inner.arena.buffer("", role, window).unwrap(), &mut bytes).unwrap();
            assert!(bytes[12..].iter().all(|&b| b == 0), "{role:?}: {bytes:?}");
        }
    }

    #[test]
    fn a_lost_device_is_an_error_with_a_name() {
        let Some(mut executor) = executor() else { return };
        let mut w = [1.0, 2.0, 3.0];
        step(&mut executor, &mut w, [1.0; 3]).unwrap();
        let before = w;
        executor.force_loss();
        let error = step(&mut executor, &mut w, [1.0; 3]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeviceLost, "{error}");
        assert!(error.to_string().ends_with("; restore parameters and state from one checkpoint"), "{error}");
        assert_eq!(w, before);
        assert_eq!(executor.read_slots(&[(0, 0)]).unwrap_err().kind(), ErrorKind::DeviceLost);
    }

    #[test]
    fn a_refused_allocation_changes_nothing() {
        let Some(mut executor) = executor() else { return };
        let inner = executor.inner.get_mut("").unwrap();
        // One window longer than any buffer may be; drivers that overcommit never run out of memory here.
        let plain = inner.arena.layout.rewindowed(1 << 20).unwrap();
        inner.arena.layout = inner.arena.layout.rewindowed(1 << 50).unwrap();
        executor.add(&[ParamInfo::vector("v", 1 << 50, Dtype::F32)]).unwrap();
        let error = executor.reserve(&[SlotSet::EMPTY; 2]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Device | ErrorKind::OutOfMemory), "{error}");
        let inner = executor.inner.get_mut("").unwrap();
        assert!(inner.arena.is_unallocated() && inner.arena.generation == 0);
        inner.arena.layout = plain;
        executor.truncate(1).unwrap();
        let mut w = [1.0, 2.0, 3.0];
        step(&mut executor, &mut w, [1.0; 3]).unwrap();
    }

    #[test]
    fn a_forked_child_is_refused() {
        let Some(mut executor) = executor() else { return };
        executor.inner.pretend_forked();
        let mut w = [1.0, 2.0, 3.0];
        assert_eq!(step(&mut executor, &mut w, [1.0; 3]).unwrap_err().kind(), ErrorKind::Forked);
        assert_eq!(executor.read_slots(&[(0, 0)]).unwrap_err().kind(), ErrorKind::Forked);
        assert_eq!(executor.add(&[]).unwrap_err().kind(), ErrorKind::Forked);
    }
}
