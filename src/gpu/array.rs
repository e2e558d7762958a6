//! Arrays of the user on a device: gradients that need not cross the bus.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::arena::ALIGN;
use super::context::{Context, DeviceInfo, DeviceRequest, OfProcess, lock};
use super::passes::{Bounds, CHUNK, Dispatch, Finding, GuardPasses, Table};
use super::staging::{BLOCK_BYTES, Download, Part, Sink, Source, Staging, Upload, submit, unmapped};
use crate::error::{Error, ErrorKind, Result};
use crate::real::Dtype;
use crate::shader::{self, CONTROL_WORDS};
use crate::tensor::{TensorMut, TensorRef};

/// Numbers on a device, in C order.
#[derive(Debug)]
pub struct Array {
    id: u64,
    len: usize,
    dtype: Dtype,
    held: OfProcess<Held>,
}

#[derive(Debug)]
struct Held {
    context: Arc<Context>,
    /// Elements of each buffer but the last.
    window: usize,
    buffers: Vec<wgpu::Buffer>,
    staging: Mutex<Staging>,
}

/// Stands for sums of gradients on the device.
#[derive(Debug)]
struct Sum;

/// The sum of gradients that an executor holds, as a gradient of so many elements.
pub(crate) fn sum_of(len: usize) -> TensorRef<'static> {
    TensorRef::on_device(len, Dtype::F32, Arc::new(Sum))
}

/// Whether a gradient is such a sum.
pub(super) fn is_sum(gradient: &TensorRef<'_>) -> bool {
    gradient.on_device.as_ref().is_some_and(|array| array.is::<Sum>())
}

/// Part of an array in one of its buffers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) buffer: usize,
    /// First element in the buffer.
    pub(super) at: usize,
    /// First element in the array.
    pub(super) start: usize,
    pub(super) len: usize,
}

impl Array {
    /// `len` zeros that store `dtype`, on the device that the request asks for.
    pub fn zeros(place: &'static str, request: &DeviceRequest, dtype: Dtype, len: usize) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if dtype == Dtype::F64 || dtype.is_complex() {
            let allowed = "float32, float16 or bfloat16 on a GPU";
            return Err(Error::refuse(ErrorKind::Type, place, "dtype", allowed, dtype));
        }
        let context = Context::shared(place, request)?;
        let window = context.window_elements();
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let mapped = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::MAP_READ;
        let usage = if context.shares_memory { usage | mapped } else { usage };
        context.refuse_beyond_memory(place, (len * dtype.size()) as u64)?;
        let buffers = context.scoped(place, || {
            let starts = (0..len.max(1)).step_by(window);
            let of = |start: usize| (len - start).clamp(1, window).next_multiple_of(ALIGN) * dtype.size();
            Ok(starts.map(|start| context.buffer("array", of(start) as u64, usage, false)).collect())
        })?;
        let staging = Mutex::new(Staging::new(BLOCK_BYTES));
        let held = OfProcess::new(Held { context, window, buffers, staging });
        Ok(Self { id: NEXT.fetch_add(1, Ordering::Relaxed), len, dtype, held })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it stores.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where it lies.
    pub fn device(&self, place: &str) -> Result<&DeviceInfo> {
        Ok(&self.held.get(place)?.context.info)
    }

    /// As a gradient.
    pub fn as_gradient(self: &Arc<Self>) -> TensorRef<'static> {
        TensorRef::on_device(self.len, self.dtype, self.clone())
    }

    /// The array behind such a gradient.
    pub(super) fn of<'a>(gradient: &'a TensorRef<'_>) -> Option<&'a Self> {
        gradient.on_device.as_ref()?.downcast_ref()
    }

    /// Tells arrays apart for good.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn context(&self, place: &str) -> Result<&Arc<Context>> {
        Ok(&self.held.get(place)?.context)
    }

    pub(super) fn buffer(&self, place: &str, index: usize) -> Result<&wgpu::Buffer> {
        Ok(&self.held.get(place)?.buffers[index])
    }

    /// The parts of elements `start..start + len`, each in one buffer.
    pub(super) fn pieces(&self, place: &str, start: usize, len: usize) -> Result<Vec<Piece>> {
        let window = self.held.get(place)?.window;
        let mut pieces = Vec::new();
        let mut next = start;
        while next < start + len {
            let (buffer, at) = (next / window, next % window);
            let part = (start + len - next).min(window - at);
            pieces.push(Piece { buffer, at, start: next, len: part });
            next += part;
        }
        Ok(pieces)
    }

    fn refuse_other_form(&self, place: &str, len: usize, dtype: Dtype) -> Result<()> {
        if (len, dtype) == (self.len, self.dtype) {
            return Ok(());
        }
        let (allowed, got) = (format!("{} elements of {}", self.len, self.dtype), format!("{len} of {dtype}"));
        Err(Error::refuse(ErrorKind::Value, place, "the array", allowed, got))
    }

    /// Replaces its values.
    pub fn write(&self, place: &str, pool: Option<&rayon::ThreadPool>, from: &TensorRef<'_>) -> Result<()> {
        let Held { context, buffers, staging, .. } = self.held.get(place)?;
        self.refuse_other_form(place, from.raw.len, from.raw.dtype)?;
        context.check(place)?;
        let mut staging = lock(staging);
        let size = self.dtype.size();
        let mut uploads = Vec::new();
        for piece in self.pieces(place, 0, self.len)? {
            for part in (0..piece.len).step_by(staging.longest()) {
                let len = (piece.len - part).min(staging.longest());
                // SAFETY: TensorRef promises memory for its elements, whose number was compared.
                let source = unsafe { Part::new(&from.raw, piece.start + part, len) };
                uploads.push(Upload {
                    target: &buffers[piece.buffer],
                    offset: ((piece.at + part) * size) as u64,
                    bytes: len.next_multiple_of(ALIGN) * size,
                    source: Source::Array(source),
                });
            }
        }
        let encoder = context.device.create_command_encoder(&Default::default());
        let encoder = staging.upload(context, place, pool, &uploads, encoder)?;
        submit(context, place, encoder).map(|_| ())
    }

    /// Replaces its values by those of another array on the same device, without waiting.
    pub fn copy_from(&self, place: &str, from: &Self) -> Result<()> {
        let Held { context, buffers, .. } = self.held.get(place)?;
        self.refuse_other_form(place, from.len, from.dtype)?;
        if !Arc::ptr_eq(context, from.context(place)?) {
            return Err(Error::refuse(ErrorKind::Value, place, "the array", "on the same device", "one on another"));
        }
        context.check(place)?;
        let mut encoder = context.device.create_command_encoder(&Default::default());
        for (index, target) in buffers.iter().enumerate().filter(|_| !std::ptr::eq(self, from)) {
            encoder.copy_buffer_to_buffer(from.buffer(place, index)?, 0, target, 0, target.size());
        }
        submit(context, place, encoder).map(|_| ())
    }

    /// Copies its values to the host.
    pub fn read(&self, place: &str, pool: Option<&rayon::ThreadPool>, to: &mut TensorMut<'_>) -> Result<()> {
        let Held { context, buffers, staging, .. } = self.held.get(place)?;
        self.refuse_other_form(place, to.raw.len, to.raw.dtype)?;
        context.check(place)?;
        let staging = lock(staging);
        let size = self.dtype.size();
        let mut downloads = Vec::new();
        for piece in self.pieces(place, 0, self.len)? {
            for part in (0..piece.len).step_by(staging.longest()) {
                let len = (piece.len - part).min(staging.longest());
                // SAFETY: TensorMut promises memory for its elements, whose number was compared; pieces are disjoint.
                let sink = unsafe { Part::new(&to.raw, piece.start + part, len) };
                downloads.push(Download {
                    source: &buffers[piece.buffer],
                    offset: ((piece.at + part) * size) as u64,
                    bytes: len.next_multiple_of(ALIGN) * size,
                    sink: Sink::Array(sink),
                });
            }
        }
        if downloads.is_empty() {
            return Ok(());
        }
        let encoder = context.device.create_command_encoder(&Default::default());
        staging.download(context, place, pool, encoder, downloads).map(|_| ())
    }
}

/// Waits until the device that the request asks for has done all it was given.
pub fn synchronize(place: &str, request: &DeviceRequest) -> Result<()> {
    let context = Context::shared(place, request)?;
    context.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| unmapped(place, e))?;
    context.check(place)
}

/// The norm of gradients on a device, fetched when it is asked for.
#[derive(Debug)]
pub struct Norm {
    held: OfProcess<(Arc<Context>, Option<wgpu::Buffer>)>,
}

impl Norm {
    /// Waits for it.
    pub fn value(&self, place: &str) -> Result<f64> {
        let (context, work) = self.held.get(place)?;
        let Some(work) = work else { return Ok(0.0) };
        let mut bytes = [0; 4 * CONTROL_WORDS];
        let download =
            Download { source: work, offset: 0, bytes: bytes.len(), sink: Sink::Bytes(bytes.as_mut_slice()) };
        let encoder = context.device.create_command_encoder(&Default::default());
        Staging::new(BLOCK_BYTES).download(context, place, None, encoder, vec![download])?;
        Ok(Finding::read(&bytes).norm)
    }
}

/// Scales arrays so that their common 2-norm is at most `max_norm`, if there is one, without waiting; the norm they
/// had.
///
/// All of them must lie on one device.
pub fn clip_norm(place: &str, arrays: &[Arc<Array>], max_norm: Option<f64>) -> Result<Norm> {
    let Some(first) = arrays.first() else {
        return Err(Error::refuse(ErrorKind::Value, place, "gradients", "on a device", "none"));
    };
    let context = first.context(place)?;
    context.check(place)?;
    let mut tables = Vec::new();
    for array in arrays {
        if !Arc::ptr_eq(array.context(place)?, context) {
            return Err(Error::refuse(ErrorKind::Value, place, "gradients", "on one device", "several"));
        }
        for piece in array.pieces(place, 0, array.len)? {
            let mut table = Table::default();
            table.push(CHUNK, piece.at, piece.at, piece.len, 0);
            tables.push((array.dtype, array.buffer(place, piece.buffer)?, table));
        }
    }
    let chunks = tables.iter().map(|(.., table)| table.len()).sum();
    if chunks == 0 {
        return Ok(Norm { held: OfProcess::new((context.clone(), None)) });
    }
    let bounds = Bounds { max_norm: Some(max_norm.unwrap_or(f64::INFINITY)), ..Bounds::NONE };
    let words: Vec<u8> = bounds.words(chunks).iter().flat_map(|word| word.to_le_bytes()).collect();
    let (work, buffers) = context.scoped(place, || {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let work = context.buffer("control", words.len() as u64, usage, false);
        context.queue.write_buffer(&work, 0, &words);
        let mut next = 0;
        let buffers = tables.iter().map(|(.., table)| {
            let first = next;
            next += table.len();
            table.buffer(context, place, first)
        });
        Ok((work, buffers.collect::<Result<Vec<_>>>()?))
    })?;
    let measured: Vec<_> = tables
        .iter()
        .zip(&buffers)
        .map(|((dtype, gradients, table), buffer)| (*dtype, *gradients, buffer, table.len()))
        .collect();
    let guard = GuardPasses::new(context, place, &work, &measured, chunks)?;
    let pipelines = measured
        .iter()
        .map(|&(dtype, ..)| context.pipeline(place, &format!("scale {dtype}"), || shader::scale(dtype)))
        .collect::<Result<Vec<_>>>()?;
    let scales: Vec<Dispatch> = context.scoped(place, || {
        let one = |(&(_, gradients, table, count), pipeline): (&(_, _, _, _), _)| {
            Dispatch::new(context, "scale", pipeline, &[gradients, table, &work], count)
        };
        Ok(measured.iter().zip(pipelines).map(one).collect())
    })?;
    let mut encoder = context.device.create_command_encoder(&Default::default());
    guard.record(context, &mut encoder);
    if max_norm.is_some() {
        Dispatch::record(context, &mut encoder, &scales);
    }
    submit(context, place, encoder)?;
    Ok(Norm { held: OfProcess::new((context.clone(), Some(work))) })
}
