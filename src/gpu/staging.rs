//! The way between host arrays and device buffers.
//!
//! Buffers in memory that host and device share are mapped and written where they lie. All others go through a few
//! mapped blocks: the arrays of a call share a block, one copy per run of neighbours, not one per array. What
//! exceeds a block goes in several, so host memory for staging stays bounded. Large copies are spread over threads.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rayon::ThreadPool;
use rayon::prelude::*;

use super::context::{Context, lock};
use crate::cpu::memory;
use crate::drill::point;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::RawTensor;

/// Bytes of a block, unless a single item is larger.
pub(super) const BLOCK_BYTES: usize = 64 << 20;
const SMALLEST_BLOCK: usize = 64 << 10;
/// Blocks in flight before an upload waits: the device works on some while the host fills another.
const RING: usize = 3;
/// Bytes of what one thread copies at a time. A multiple of every element's size.
const PIECE_BYTES: usize = 64 << 10;

/// After so long a block is taken as never submitted.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// Bytes of a block that are left to the small items beside a long one.
const ROOM: usize = 256 << 10;

const WAITING: u8 = 0;
const MAPPED: u8 = 1;
const FAILED: u8 = 2;

/// Elements of an array of the host, in C order.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    raw: &'a RawTensor,
    start: usize,
    len: usize,
}

impl<'a> Part<'a> {
    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// Until the part is gone the array is allocated, aligned and initialized and has these elements; where they are
    /// written to, it is writable, and nothing else reads or writes them.
    pub(super) unsafe fn new(raw: &'a RawTensor, start: usize, len: usize) -> Self {
        Self { raw, start, len }
    }
}

/// Where an upload comes from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Array(Part<'a>),
    Bytes(&'a [u8]),
}

/// Where a download goes.
pub(super) enum Sink<'a> {
    Array(Part<'a>),
    Bytes(&'a mut [u8]),
}

/// One part of an upload.
pub(super) struct Upload<'a> {
    pub(super) target: &'a wgpu::Buffer,
    pub(super) offset: u64,
    /// Bytes to write; zeros follow the source's.
    pub(super) bytes: usize,
    pub(super) source: Source<'a>,
}

/// One part of a download.
pub(super) struct Download<'a> {
    pub(super) source: &'a wgpu::Buffer,
    pub(super) offset: u64,
    /// Bytes to read; those past the sink's are dropped.
    pub(super) bytes: usize,
    pub(super) sink: Sink<'a>,
}

/// A block on its way: mapped again once the device has read it.
#[derive(Debug)]
struct Block {
    buffer: wgpu::Buffer,
    state: Arc<AtomicU8>,
}

impl Block {
    fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }
}

/// The blocks, reused from call to call.
#[derive(Debug)]
pub(super) struct Staging {
    block_bytes: usize,
    up: Vec<Block>,
    down: Mutex<Option<wgpu::Buffer>>,
}

/// Copies that continue each other become one.
#[derive(Default)]
struct Copies<'a> {
    run: Option<(&'a wgpu::Buffer, u64, &'a wgpu::Buffer, u64, u64)>,
}

impl<'a> Copies<'a> {
    fn push(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        from: (&'a wgpu::Buffer, u64),
        to: (&'a wgpu::Buffer, u64),
        bytes: u64,
    ) {
        if let Some((source, source_at, target, target_at, run)) = &mut self.run
            && (*source, *source_at + *run) == from
            && (*target, *target_at + *run) == to
        {
            *run += bytes;
            return;
        }
        self.flush(encoder);
        self.run = Some((from.0, from.1, to.0, to.1, bytes));
    }

    fn flush(&mut self, encoder: &mut wgpu::CommandEncoder) {
        if let Some((source, source_at, target, target_at, bytes)) = self.run.take() {
            encoder.copy_buffer_to_buffer(source, source_at, target, target_at, bytes);
        }
    }
}

/// How many items from the front fit into a block, and their bytes. At least one.
fn batch(sizes: impl Iterator<Item = usize>, block: usize) -> (usize, usize) {
    let (mut count, mut total) = (0, 0);
    for bytes in sizes {
        if count > 0 && total + bytes > block {
            break;
        }
        (count, total) = (count + 1, total + bytes);
    }
    (count, total)
}

/// The part of a buffer that such items touch, by buffer, in order of first mention.
fn spans<'a>(items: impl Iterator<Item = (&'a wgpu::Buffer, u64, usize)>) -> Vec<(&'a wgpu::Buffer, u64, u64)> {
    let mut spans: Vec<(&wgpu::Buffer, u64, u64)> = Vec::new();
    for (buffer, offset, bytes) in items {
        let end = offset + bytes as u64;
        match spans.iter_mut().rev().find(|(known, ..)| *known == buffer) {
            Some((_, from, to)) => (*from, *to) = ((*from).min(offset), (*to).max(end)),
            None => spans.push((buffer, offset, end)),
        }
    }
    spans
}

/// An error after part of the work was handed to the device: what it changed is not known.
fn interrupted(place: &str, cause: Error) -> Error {
    if cause.kind() == ErrorKind::DeviceLost {
        return cause;
    }
    Error::plain(ErrorKind::DeviceLost, format!("{place}: the GPU failed half-way: {cause}")).with_source(cause)
}

/// Hands recorded commands to the device. On an error nothing was executed.
pub(super) fn submit(context: &Context, place: &str, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
    let _mapping = context.mapping();
    submit_now(context, place, encoder)
}

/// [`submit`], for who has the right to.
fn submit_now(context: &Context, place: &str, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
    context.scoped(place, || Ok(context.queue.submit([encoder.finish()])))
}

/// Calls `each` with every piece, on the pool where there is enough to do.
fn spread<T: Send>(pool: Option<&ThreadPool>, pieces: Vec<T>, each: impl Fn(T) + Sync + Send) {
    match pool.filter(|_| pieces.len() > 4) {
        Some(pool) => pool.install(|| pieces.into_par_iter().for_each(each)),
        None => pieces.into_iter().for_each(each),
    }
}

/// Mapped memory of a fixed size, which may go to another thread; wgpu's slices may not.
type Piece<'a> = wgpu::WriteOnly<'a, [u8; PIECE_BYTES]>;

/// What is to be written: whole pieces for all threads, and the calling thread's ends. With each goes the byte of
/// the source that it begins with.
#[derive(Default)]
struct Fills<'a> {
    pieces: Vec<(Piece<'a>, Source<'a>, usize)>,
    ends: Vec<(wgpu::WriteOnly<'a, [u8]>, Source<'a>, usize)>,
}

impl<'a> Fills<'a> {
    fn push(&mut self, target: wgpu::WriteOnly<'a, [u8]>, source: Source<'a>) {
        let (pieces, end) = target.into_chunks::<PIECE_BYTES>();
        let behind = pieces.len() * PIECE_BYTES;
        let pieces = pieces.into_iter().enumerate().map(|(i, piece)| (piece, source, i * PIECE_BYTES));
        self.pieces.extend(pieces);
        self.ends.push((end, source, behind));
    }

    fn run(self, pool: Option<&ThreadPool>) {
        self.ends.into_iter().for_each(|(target, source, from)| fill(target, source, from));
        spread(pool, self.pieces, |(piece, source, from)| fill(piece.into(), source, from));
    }
}

/// Writes the source's bytes from `from` on, and zeros behind its end.
fn fill(mut target: wgpu::WriteOnly<'_, [u8]>, source: Source<'_>, from: usize) {
    point();
    let filled = match source {
        Source::Array(Part { raw, start, len }) => {
            let size = raw.dtype.size();
            let count = len.saturating_sub(from / size).min(target.len() / size);
            // SAFETY: promised when the part was made.
            unsafe {
                memory::read_bytes(raw, start + from / size, count, |offset, part| {
                    target.slice(offset..offset + part.len()).copy_from_slice(part);
                });
            }
            count * size
        }
        Source::Bytes(all) => {
            let part = &all[from.min(all.len())..];
            let part = &part[..part.len().min(target.len())];
            target.slice(..part.len()).copy_from_slice(part);
            part.len()
        }
    };
    target.slice(filled..).fill(0);
}

/// Bytes for a sink, from its byte `at` on.
struct Drain<'a> {
    bytes: &'a [u8],
    sink: Sink<'a>,
    at: usize,
}

impl<'a> Drain<'a> {
    fn pieces(bytes: &'a [u8], sink: Sink<'a>, into: &mut Vec<Self>) {
        match sink {
            Sink::Array(part @ Part { raw, len, .. }) => {
                let whole = &bytes[..len * raw.dtype.size()];
                into.extend(whole.chunks(PIECE_BYTES).enumerate().map(|(i, bytes)| Self {
                    bytes,
                    sink: Sink::Array(part),
                    at: i * PIECE_BYTES,
                }));
            }
            Sink::Bytes(target) => {
                let whole = &bytes[..target.len()];
                into.extend(
                    target.chunks_mut(PIECE_BYTES).zip(whole.chunks(PIECE_BYTES)).map(|(target, bytes)| Self {
                        bytes,
                        sink: Sink::Bytes(target),
                        at: 0,
                    }),
                );
            }
        }
    }

    fn run(self) {
        point();
        match self.sink {
            // SAFETY: promised when the part was made; pieces are disjoint.
            Sink::Array(Part { raw, start, .. }) => unsafe {
                memory::write_bytes(raw, start + self.at / raw.dtype.size(), self.bytes);
            },
            Sink::Bytes(target) => target.copy_from_slice(self.bytes),
        }
    }
}

type Outcome = mpsc::Receiver<std::result::Result<(), wgpu::BufferAsyncError>>;

/// Buffers that are mapped, or about to be; unmapped when this goes.
struct Mapped<'a>(Vec<&'a wgpu::Buffer>);

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|buffer| buffer.unmap());
    }
}

/// A few bytes on their way to the host.
#[derive(Debug)]
pub(super) struct Ticket {
    buffer: wgpu::Buffer,
    outcome: Outcome,
    index: Option<wgpu::SubmissionIndex>,
}

impl Ticket {
    /// Records a copy of a buffer's first bytes.
    pub(super) fn record(
        context: &Context,
        place: &str,
        encoder: &mut wgpu::CommandEncoder,
        source: &wgpu::Buffer,
        bytes: usize,
    ) -> Result<Self> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let buffer = context.scoped(place, || Ok(context.buffer("ticket", bytes as u64, usage, false)))?;
        encoder.copy_buffer_to_buffer(source, 0, &buffer, 0, bytes as u64);
        let outcome = map_on_submit(encoder, &buffer, wgpu::MapMode::Read, 0..bytes as u64);
        Ok(Self { buffer, outcome, index: None })
    }

    /// Says in which submission it went.
    pub(super) fn submitted(mut self, index: wgpu::SubmissionIndex) -> Self {
        self.index = Some(index);
        self
    }

    /// The bytes, once they are here.
    pub(super) fn wait(self, context: &Context, place: &str) -> Result<Vec<u8>> {
        let index = self.index.ok_or_else(|| Error::plain(ErrorKind::Internal, format!("{place}: never submitted")))?;
        wait(context, place, &index, &self.outcome)?;
        let view = self.buffer.slice(..).get_mapped_range().map_err(|e| unmapped(place, e))?;
        Ok(view.to_vec())
    }
}

fn map_on_submit(
    encoder: &wgpu::CommandEncoder,
    buffer: &wgpu::Buffer,
    mode: wgpu::MapMode,
    range: std::ops::Range<u64>,
) -> Outcome {
    let (report, outcome) = mpsc::channel();
    encoder.map_buffer_on_submit(buffer, mode, range, move |mapped| {
        // The receiver is gone if the call failed meanwhile.
        let _ = report.send(mapped);
    });
    outcome
}

impl Staging {
    pub(super) fn new(block_bytes: usize) -> Self {
        Self { block_bytes, up: Vec::new(), down: Mutex::default() }
    }

    /// The same for another device.
    pub(super) fn anew(&self) -> Self {
        Self::new(self.block_bytes)
    }

    /// Elements of the longest item worth making.
    pub(super) fn longest(&self) -> usize {
        if self.block_bytes > 4 * ROOM { (self.block_bytes - ROOM) / 4 } else { self.block_bytes / 4 }
    }

    /// Records the uploads. Where they need more than one block, the earlier ones are submitted here; an
    /// error after that is [`ErrorKind::DeviceLost`].
    pub(super) fn upload(
        &mut self,
        context: &Context,
        place: &str,
        pool: Option<&ThreadPool>,
        uploads: &[Upload<'_>],
        mut encoder: wgpu::CommandEncoder,
    ) -> Result<wgpu::CommandEncoder> {
        let is_shared = |upload: &&Upload<'_>| upload.target.usage().contains(wgpu::BufferUsages::MAP_WRITE);
        let (shared, staged): (Vec<_>, Vec<_>) = uploads.iter().partition(is_shared);
        if !shared.is_empty() {
            write_in_place(context, place, pool, &shared)?;
        }
        let mut staged = &staged[..];
        let mut submitted = false;
        while !staged.is_empty() {
            let after = |error| if submitted { interrupted(place, error) } else { error };
            let (count, bytes) = batch(staged.iter().map(|u| u.bytes), self.block_bytes);
            let (now, later) = staged.split_at(count);
            self.fill(context, place, pool, now, bytes, &mut encoder).map_err(after)?;
            if !later.is_empty() {
                let next = context.device.create_command_encoder(&Default::default());
                submit(context, place, std::mem::replace(&mut encoder, next)).map_err(after)?;
                submitted = true;
            }
            staged = later;
        }
        Ok(encoder)
    }

    fn fill(
        &mut self,
        context: &Context,
        place: &str,
        pool: Option<&ThreadPool>,
        uploads: &[&Upload<'_>],
        bytes: usize,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<()> {
        let buffer = self.acquire(context, place, bytes)?;
        let mut view = buffer.slice(0..bytes as u64).get_mapped_range_mut().map_err(|e| unmapped(place, e))?;
        let (mut rest, mut fills) = (view.slice(..), Fills::default());
        let (mut at, mut copies) = (0, Copies::default());
        for upload in uploads {
            let (target, behind) = rest.split_at(upload.bytes);
            rest = behind;
            fills.push(target, upload.source);
            copies.push(encoder, (&buffer, at), (upload.target, upload.offset), upload.bytes as u64);
            at += upload.bytes as u64;
        }
        fills.run(pool);
        copies.flush(encoder);
        drop(view);
        buffer.unmap();
        let state = Arc::new(AtomicU8::new(WAITING));
        let report = state.clone();
        encoder.map_buffer_on_submit(&buffer, wgpu::MapMode::Write, .., move |outcome| {
            report.store(if outcome.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
        self.up.push(Block { buffer, state });
        Ok(())
    }

    /// A mapped block of at least so many bytes.
    fn acquire(&mut self, context: &Context, place: &str, bytes: usize) -> Result<wgpu::Buffer> {
        let fits = |block: &Block| block.state() == MAPPED && block.buffer.size() >= bytes as u64;
        let started = Instant::now();
        while !self.up.is_empty() {
            context.device.poll(wgpu::PollType::Poll).map_err(|e| unmapped(place, e))?;
            if let Some(found) = self.up.iter().position(fits) {
                return Ok(self.up.swap_remove(found).buffer);
            }
            // The oldest is on its way; what is behind it need not be waited for.
            let comes = self.up.iter().any(|block| block.state() == WAITING && block.buffer.size() >= bytes as u64);
            if self.up.len() < RING || !comes || started.elapsed() > LONGEST_WAIT {
                break;
            }
            context.check(place)?;
            std::thread::sleep(Duration::from_micros(50));
        }
        if self.up.len() >= RING {
            // Too small, failed, or never submitted because a call stopped half-way.
            self.up.clear();
        }
        let size = bytes.next_power_of_two().max(SMALLEST_BLOCK) as u64;
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        context.scoped(place, || Ok(context.buffer("upload", size, usage, true)))
    }

    /// Submits what was recorded, with the downloads behind it, and returns once they have arrived. Without
    /// downloads it does not wait. After the first submission every error is [`ErrorKind::DeviceLost`]; before it
    /// nothing was executed. Returns the first submission.
    pub(super) fn download(
        &self,
        context: &Context,
        place: &str,
        pool: Option<&ThreadPool>,
        mut encoder: wgpu::CommandEncoder,
        downloads: Vec<Download<'_>>,
    ) -> Result<wgpu::SubmissionIndex> {
        let is_shared = |download: &Download<'_>| download.source.usage().contains(wgpu::BufferUsages::MAP_READ);
        let (shared, mut staged): (Vec<_>, Vec<_>) = downloads.into_iter().partition(is_shared);
        let spans = spans(shared.iter().map(|d| (d.source, d.offset, d.bytes)));
        // From the submission that maps them until they are unmapped.
        let mut mapping = (!shared.is_empty()).then(|| context.mapping());
        let in_place: Vec<Outcome> = spans
            .iter()
            .map(|&(buffer, from, to)| map_on_submit(&encoder, buffer, wgpu::MapMode::Read, from..to))
            .collect();
        let mut first = None;
        while first.is_none() || !staged.is_empty() {
            let after = |error| if first.is_some() { interrupted(place, error) } else { error };
            let (count, bytes) = batch(staged.iter().map(|d| d.bytes), self.block_bytes);
            let now: Vec<Download<'_>> = staged.drain(..count).collect();
            let landing = if count == 0 { None } else { Some(self.landing(context, place, bytes).map_err(after)?) };
            let outcome = landing.as_ref().map(|buffer| {
                let (mut at, mut copies) = (0, Copies::default());
                for download in &now {
                    let source = (download.source, download.offset);
                    copies.push(&mut encoder, source, (buffer, at), download.bytes as u64);
                    at += download.bytes as u64;
                }
                copies.flush(&mut encoder);
                map_on_submit(&encoder, buffer, wgpu::MapMode::Read, 0..at)
            });
            let next = context.device.create_command_encoder(&Default::default());
            let recorded = std::mem::replace(&mut encoder, next);
            let index = match &mapping {
                Some(_) => submit_now(context, place, recorded),
                None => submit(context, place, recorded),
            };
            let index = index.map_err(after)?;
            first.get_or_insert(index.clone());
            let (Some(buffer), Some(outcome)) = (landing, outcome) else { continue };
            let view = wait(context, place, &index, &outcome)
                .and_then(|()| buffer.slice(0..bytes as u64).get_mapped_range().map_err(|e| unmapped(place, e)))
                .map_err(|error| interrupted(place, error))?;
            let (mut at, mut drains) = (0, Vec::new());
            for download in now {
                Drain::pieces(&view[at..at + download.bytes], download.sink, &mut drains);
                at += download.bytes;
            }
            spread(pool, drains, Drain::run);
            drop(view);
            buffer.unmap();
            *lock(&self.down) = Some(buffer);
        }
        let Some(first) = first else { unreachable!("the loop ran at least once") };
        if !shared.is_empty() {
            let read = || -> Result<()> {
                let _mapped = Mapped(spans.iter().map(|&(buffer, ..)| buffer).collect());
                in_place.iter().try_for_each(|outcome| wait(context, place, &first, outcome))?;
                let views = spans.iter().map(|&(buffer, from, to)| buffer.slice(from..to).get_mapped_range());
                let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(|e| unmapped(place, e))?;
                let mut drains = Vec::new();
                for download in shared {
                    let Some(k) = spans.iter().position(|&(buffer, ..)| buffer == download.source) else { continue };
                    let at = (download.offset - spans[k].1) as usize;
                    Drain::pieces(&views[k][at..at + download.bytes], download.sink, &mut drains);
                }
                spread(pool, drains, Drain::run);
                Ok(())
            };
            let outcome = read();
            mapping = None;
            outcome.map_err(|error| interrupted(place, error))?;
        }
        drop(mapping);
        Ok(first)
    }

    /// A block to read from, of at least so many bytes.
    fn landing(&self, context: &Context, place: &str, bytes: usize) -> Result<wgpu::Buffer> {
        if let Some(buffer) = lock(&self.down).take().filter(|b| b.size() >= bytes as u64) {
            return Ok(buffer);
        }
        let size = bytes.next_power_of_two().max(SMALLEST_BLOCK) as u64;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        context.scoped(place, || Ok(context.buffer("download", size, usage, false)))
    }
}

/// Writes to buffers that the host can reach, once the device is done with them.
fn write_in_place(context: &Context, place: &str, pool: Option<&ThreadPool>, uploads: &[&Upload<'_>]) -> Result<()> {
    let spans = spans(uploads.iter().map(|u| (u.target, u.offset, u.bytes)));
    let _mapping = context.mapping();
    let mapped = Mapped(spans.iter().map(|&(buffer, ..)| buffer).collect());
    let map = |&(buffer, from, to): &(&wgpu::Buffer, u64, u64)| {
        let (report, outcome) = mpsc::channel();
        buffer.slice(from..to).map_async(wgpu::MapMode::Write, move |mapped| {
            // The receiver is gone if the call failed meanwhile.
            let _ = report.send(mapped);
        });
        outcome
    };
    let outcomes: Vec<Outcome> = context.scoped(place, || Ok(spans.iter().map(map).collect()))?;
    context.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| unmapped(place, e))?;
    outcomes.iter().try_for_each(|outcome| arrived(context, place, outcome))?;
    let views = spans.iter().map(|&(buffer, from, to)| buffer.slice(from..to).get_mapped_range_mut());
    let mut views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(|e| unmapped(place, e))?;
    let mut fills = Fills::default();
    for (view, &(buffer, from, _)) in views.iter_mut().zip(&spans) {
        let mut here: Vec<&&Upload<'_>> = uploads.iter().filter(|u| u.target == buffer).collect();
        here.sort_by_key(|upload| upload.offset);
        let (mut rest, mut at) = (view.slice(..), from);
        for upload in here {
            let (_, behind) = rest.split_at((upload.offset - at) as usize);
            let (target, behind) = behind.split_at(upload.bytes);
            rest = behind;
            at = upload.offset + upload.bytes as u64;
            fills.push(target, upload.source);
        }
    }
    fills.run(pool);
    drop(views);
    drop(mapped);
    Ok(())
}

pub(super) fn unmapped(place: &str, cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::plain(ErrorKind::Device, format!("{place}: a transfer between host and GPU failed: {cause}"))
        .with_source(cause)
}

/// Waits for a submission and for the word that its block is mapped.
fn wait(context: &Context, place: &str, index: &wgpu::SubmissionIndex, outcome: &Outcome) -> Result<()> {
    let poll = wgpu::PollType::Wait { submission_index: Some(index.clone()), timeout: None };
    context.device.poll(poll).map_err(|e| unmapped(place, e))?;
    arrived(context, place, outcome)
}

/// Waits for the word that a buffer is mapped. Another thread that polls the same device may be the one that
/// delivers it.
fn arrived(context: &Context, place: &str, outcome: &Outcome) -> Result<()> {
    loop {
        context.check(place)?;
        match outcome.recv_timeout(Duration::from_millis(20)) {
            Ok(mapped) => return mapped.map_err(|e| unmapped(place, e)),
            Err(RecvTimeoutError::Timeout) => {
                context.device.poll(wgpu::PollType::Poll).map_err(|e| unmapped(place, e))?;
            }
            Err(e @ RecvTimeoutError::Disconnected) => return Err(unmapped(place, e)),
        }
    }
}
