//! The way between host arrays and arenas: a few mapped blocks, filled or read in order.
//!
//! All arrays of a call share a block: one write to mapped memory and one copy per run of neighbours, not
//! one per array. What exceeds a block goes in several, so host memory for staging stays bounded.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::context::{Context, lock};
use crate::cpu::memory;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::RawTensor;

/// Bytes of a block, unless a single item is larger.
pub(super) const BLOCK_BYTES: usize = 64 << 20;
const SMALLEST_BLOCK: usize = 64 << 10;
/// Blocks in flight before an upload waits: the device works on one while the host fills another.
const RING: usize = 2;

const WAITING: u8 = 0;
const MAPPED: u8 = 1;
const FAILED: u8 = 2;

/// Where an upload's bytes come from.
pub(super) enum Source<'a> {
    /// Elements `start..start + len` of an array of 4-byte elements, in C order.
    Array {
        raw: &'a RawTensor,
        start: usize,
        len: usize,
    },
    Bytes(&'a [u8]),
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
    pub(super) bytes: usize,
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

/// An error after part of the work was handed to the device: what it changed is not known.
fn interrupted(place: &str, cause: Error) -> Error {
    if cause.kind() == ErrorKind::DeviceLost {
        return cause;
    }
    Error::plain(ErrorKind::DeviceLost, format!("{place}: the GPU failed half-way: {cause}")).with_source(cause)
}

/// Hands recorded commands to the device. On an error nothing was executed.
pub(super) fn submit(context: &Context, place: &str, encoder: wgpu::CommandEncoder) -> Result<wgpu::SubmissionIndex> {
    context.scoped(place, || Ok(context.queue.submit([encoder.finish()])))
}

impl Staging {
    pub(super) fn new(block_bytes: usize) -> Self {
        Self { block_bytes, up: Vec::new(), down: Mutex::default() }
    }

    /// Elements of the longest item worth making.
    pub(super) fn longest(&self) -> usize {
        self.block_bytes / 4
    }

    /// Records the uploads. Where they need more than one block, the earlier ones are submitted here; an
    /// error after that is [`ErrorKind::DeviceLost`].
    ///
    /// # Safety
    /// Each array is allocated, aligned and initialized, stores 4-byte elements, and has the named range.
    pub(super) unsafe fn upload(
        &mut self,
        context: &Context,
        place: &str,
        mut uploads: &[Upload<'_>],
        mut encoder: wgpu::CommandEncoder,
    ) -> Result<wgpu::CommandEncoder> {
        let mut submitted = false;
        while !uploads.is_empty() {
            let after = |error| if submitted { interrupted(place, error) } else { error };
            let (count, bytes) = batch(uploads.iter().map(|u| u.bytes), self.block_bytes);
            let (now, later) = uploads.split_at(count);
            // SAFETY: the caller's duty.
            unsafe { self.fill(context, place, now, bytes, &mut encoder) }.map_err(after)?;
            if !later.is_empty() {
                let next = context.device.create_command_encoder(&Default::default());
                submit(context, place, std::mem::replace(&mut encoder, next)).map_err(after)?;
                submitted = true;
            }
            uploads = later;
        }
        Ok(encoder)
    }

    /// # Safety
    /// As for [`Staging::upload`].
    unsafe fn fill(
        &mut self,
        context: &Context,
        place: &str,
        uploads: &[Upload<'_>],
        bytes: usize,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<()> {
        let buffer = self.acquire(context, place, bytes)?;
        let mut view = buffer.slice(0..bytes as u64).get_mapped_range_mut().map_err(|e| unmapped(place, e))?;
        let (mut at, mut copies) = (0, Copies::default());
        for upload in uploads {
            let mut target = view.slice(at..at + upload.bytes);
            let filled = match upload.source {
                Source::Array { raw, start, len } => {
                    // SAFETY: the caller's duty.
                    unsafe {
                        memory::read_bytes(raw, start, len, |offset, part| {
                            target.slice(offset..offset + part.len()).copy_from_slice(part);
                        });
                    }
                    4 * len
                }
                Source::Bytes(all) => {
                    target.slice(..all.len()).copy_from_slice(all);
                    all.len()
                }
            };
            target.slice(filled..).fill(0);
            copies.push(encoder, (&buffer, at as u64), (upload.target, upload.offset), upload.bytes as u64);
            at += upload.bytes;
        }
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
        for poll in [wgpu::PollType::Poll, wgpu::PollType::wait_indefinitely()] {
            if self.up.is_empty() || (poll.is_wait() && self.up.len() < RING) {
                break;
            }
            context.device.poll(poll).map_err(|e| unmapped(place, e))?;
            if let Some(found) = self.up.iter().position(fits) {
                return Ok(self.up.swap_remove(found).buffer);
            }
        }
        if self.up.len() >= RING {
            // Too small, failed, or never submitted because a call stopped half-way.
            self.up.clear();
        }
        let size = bytes.next_power_of_two().max(SMALLEST_BLOCK) as u64;
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        context.scoped(place, || Ok(context.buffer("upload", size, usage, true)))
    }

    /// Submits what was recorded, with the downloads behind it, and hands each download's bytes to `take`
    /// with its position. Without downloads it does not wait. After the first submission every error is
    /// [`ErrorKind::DeviceLost`]; before it nothing was executed.
    pub(super) fn download(
        &self,
        context: &Context,
        place: &str,
        mut encoder: wgpu::CommandEncoder,
        downloads: &[Download<'_>],
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        if downloads.is_empty() {
            return submit(context, place, encoder).map(|_| ());
        }
        let mut first = 0;
        while first < downloads.len() {
            let after = |error| if first > 0 { interrupted(place, error) } else { error };
            let (count, bytes) = batch(downloads[first..].iter().map(|d| d.bytes), self.block_bytes);
            let buffer = self.landing(context, place, bytes).map_err(after)?;
            let (mut at, mut copies) = (0, Copies::default());
            for download in &downloads[first..first + count] {
                copies.push(&mut encoder, (download.source, download.offset), (&buffer, at), download.bytes as u64);
                at += download.bytes as u64;
            }
            copies.flush(&mut encoder);
            let (report, outcome) = mpsc::channel();
            encoder.map_buffer_on_submit(&buffer, wgpu::MapMode::Read, 0..bytes as u64, move |mapped| {
                // The receiver is gone if the call failed meanwhile.
                let _ = report.send(mapped);
            });
            let next = context.device.create_command_encoder(&Default::default());
            let index = submit(context, place, std::mem::replace(&mut encoder, next)).map_err(after)?;
            let view = wait(context, place, index, &outcome)
                .and_then(|()| buffer.slice(0..bytes as u64).get_mapped_range().map_err(|e| unmapped(place, e)))
                .map_err(|error| interrupted(place, error))?;
            let mut at = 0;
            for (k, download) in downloads[first..first + count].iter().enumerate() {
                take(first + k, &view[at..at + download.bytes]);
                at += download.bytes;
            }
            drop(view);
            buffer.unmap();
            *lock(&self.down) = Some(buffer);
            first += count;
        }
        Ok(())
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

pub(super) fn unmapped(place: &str, cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::plain(ErrorKind::Device, format!("{place}: a transfer between host and GPU failed: {cause}"))
        .with_source(cause)
}

/// Waits for a submission and for the word that its block is mapped. Another thread that polls the same
/// device may be the one that delivers it.
fn wait(
    context: &Context,
    place: &str,
    index: wgpu::SubmissionIndex,
    outcome: &mpsc::Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
) -> Result<()> {
    loop {
        let poll = wgpu::PollType::Wait { submission_index: Some(index.clone()), timeout: None };
        context.device.poll(poll).map_err(|e| unmapped(place, e))?;
        context.check(place)?;
        match outcome.recv_timeout(Duration::from_millis(20)) {
            Ok(mapped) => return mapped.map_err(|e| unmapped(place, e)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(e @ RecvTimeoutError::Disconnected) => return Err(unmapped(place, e)),
        }
    }
}
