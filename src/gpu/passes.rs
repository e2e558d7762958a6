//! Compute passes over chunks of tensors: their tables, and the guard that looks at gradients on the device.

use std::sync::Arc;

use super::context::Context;
use super::pipeline::Pipeline;
use super::staging::unmapped;
use crate::error::Result;
use crate::real::Dtype;
use crate::shader::{self, CHUNK_WORDS, CONTROL_WORDS, PARTIAL_WORDS, TABLE_WORDS};

/// Elements of a chunk: what one workgroup updates.
pub const CHUNK: usize = 4096;

/// One dispatch, ready to be recorded.
#[derive(Debug)]
pub(super) struct Dispatch {
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    workgroups: u32,
}

impl Dispatch {
    /// Of a pipeline over these buffers, in the order of its bindings.
    pub(super) fn new(
        context: &Context,
        label: &str,
        pipeline: Arc<Pipeline>,
        buffers: &[&wgpu::Buffer],
        workgroups: u32,
    ) -> Self {
        let bind_group = pipeline.bind(context, label, buffers);
        Self { pipeline, bind_group, workgroups }
    }

    /// Records one pass of such dispatches. Where the chunks are more than one axis of the grid holds, it has two.
    pub(super) fn record<'a>(
        context: &Context,
        encoder: &mut wgpu::CommandEncoder,
        dispatches: impl IntoIterator<Item = &'a Self>,
    ) {
        let widest = context.device.limits().max_compute_workgroups_per_dimension;
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for dispatch in dispatches {
            pass.set_pipeline(&dispatch.pipeline.compute);
            pass.set_bind_group(0, &dispatch.bind_group, &[]);
            pass.dispatch_workgroups(dispatch.workgroups.min(widest), dispatch.workgroups.div_ceil(widest), 1);
        }
    }
}

/// Chunks of one dispatch, as the shaders' struct `Table` has them.
#[derive(Debug, Default, Clone)]
pub(super) struct Table {
    chunks: Vec<[u32; CHUNK_WORDS]>,
}

impl Table {
    /// Cuts elements into chunks: `at` and `gradient_at` are their first elements in the bound windows.
    pub(super) fn push(&mut self, chunk: usize, at: usize, gradient_at: usize, len: usize, row: usize) {
        for start in (0..len).step_by(chunk) {
            // What one binding may span has fewer than 2³² vec4s; rows are fewer than parameters.
            let words = [(at + start) / 4, chunk.min(len - start), row, (gradient_at + start) / 4];
            self.chunks.push(words.map(|word| word as u32));
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> u32 {
        self.chunks.len() as u32
    }

    /// On the device; `first` is the number of its first chunk among all of the step.
    pub(super) fn buffer(&self, context: &Context, place: &str, first: u32) -> Result<wgpu::Buffer> {
        let mut head = [0; TABLE_WORDS];
        head[0] = first;
        table_buffer(context, place, "chunks", head.iter().chain(self.chunks.iter().flatten()))
    }
}

/// Words that shaders read, on the device.
pub(super) fn table_buffer<'a>(
    context: &Context,
    place: &str,
    label: &str,
    words: impl Iterator<Item = &'a u32>,
) -> Result<wgpu::Buffer> {
    let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    let buffer = context.buffer(label, bytes.len() as u64, wgpu::BufferUsages::STORAGE, true);
    let view = buffer.slice(..).get_mapped_range_mut();
    view.map_err(|e| unmapped(place, e))?.copy_from_slice(&bytes);
    buffer.unmap();
    Ok(buffer)
}

/// What the guard asks of the gradients of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Elements are brought into `[-bound, bound]` first; infinite leaves them.
    pub bound: f64,
    /// The gradients were multiplied by two to this power; the norm is that of what they were before.
    pub scale_exponent: i32,
    /// The largest 2-norm of all together.
    pub max_norm: Option<f64>,
    /// Whether the update is left out where a gradient is not finite.
    pub skips: bool,
}

impl Bounds {
    /// No bounds.
    pub const NONE: Self = Self { bound: f64::INFINITY, scale_exponent: 0, max_norm: None, skips: false };

    /// Whether gradients are looked at before the update.
    pub(super) fn looks(&self) -> bool {
        self.max_norm.is_some() || self.skips
    }

    /// The control words of a step with so many chunks.
    pub(super) fn words(&self, chunks: u32) -> [u32; CONTROL_WORDS] {
        let bound = self.bound as f32;
        let is_bounded = bound.is_finite();
        let switches =
            [(is_bounded, shader::BOUNDED), (self.max_norm.is_some(), shader::CLIPS_NORM), (self.skips, shader::SKIPS)];
        let switches = switches.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        let (max_hi, max_lo, max_exponent) = match self.max_norm {
            Some(max_norm) if max_norm.is_finite() => {
                let exponent = if max_norm == 0.0 { 0 } else { libm::ilogb(max_norm) };
                let (hi, lo) = halves(libm::ldexp(max_norm, -exponent));
                (hi, lo, exponent)
            }
            _ => (1.0, 0.0, shader::UNBOUNDED_EXPONENT),
        };
        let (epsilon_hi, epsilon_lo) = halves(1e-6);
        let mut words = [0; CONTROL_WORDS];
        words[0] = 1f32.to_bits();
        words[7] = chunks;
        words[8] = switches;
        words[9] = if is_bounded { bound.to_bits() } else { 0 };
        words[10..12].copy_from_slice(&[max_hi, max_lo].map(f32::to_bits));
        words[12] = max_exponent.cast_unsigned();
        words[13..15].copy_from_slice(&[epsilon_hi, epsilon_lo].map(f32::to_bits));
        words[15] = self.scale_exponent.cast_unsigned();
        words
    }
}

/// x as a sum of two f32.
fn halves(x: f64) -> (f32, f32) {
    let hi = x as f32;
    (hi, (x - f64::from(hi)) as f32)
}

/// What the guard found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Finding {
    pub(super) skipped: bool,
    /// Of all gradients within the bound.
    pub(super) norm: f64,
}

impl Finding {
    /// Out of the control words.
    pub(super) fn read(bytes: &[u8]) -> Self {
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let [hi, lo] = [words[2], words[3]].map(|bits| f64::from(f32::from_bits(bits)));
        let found = words[5];
        let is_bounded = words[8] & shader::BOUNDED != 0;
        let norm = match () {
            () if found & shader::HAS_NAN != 0 => f64::NAN,
            () if found & shader::HAS_INFINITY != 0 && !is_bounded => f64::INFINITY,
            () => libm::ldexp(hi + lo, words[4].cast_signed()),
        };
        Self { skipped: words[1] != 0, norm }
    }
}

/// The guard's passes over some tables.
#[derive(Debug)]
pub(super) struct GuardPasses {
    partials: wgpu::Buffer,
    measure: Vec<Dispatch>,
    decide: Dispatch,
}

/// One table with the gradients it speaks of.
pub(super) type Measured<'a> = (Dtype, &'a wgpu::Buffer, &'a wgpu::Buffer, u32);

impl GuardPasses {
    /// Over tables of so many chunks together, with control words at the beginning of `work`.
    pub(super) fn new(
        context: &Context,
        place: &str,
        work: &wgpu::Buffer,
        tables: &[Measured<'_>],
        chunks: u32,
    ) -> Result<Self> {
        let decide = context.pipeline(place, "decide", shader::decide)?;
        let pipelines = tables
            .iter()
            .map(|&(dtype, ..)| context.pipeline(place, &format!("measure {dtype}"), || shader::measure(dtype)))
            .collect::<Result<Vec<_>>>()?;
        context.scoped(place, || {
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
            let partials = context.buffer("partial sums", Self::bytes(chunks).max(16), usage, false);
            let measure = tables.iter().zip(pipelines).map(|(&(_, gradients, table, count), pipeline)| {
                Dispatch::new(context, "measure", pipeline, &[gradients, table, work, &partials], count)
            });
            let measure = measure.collect();
            let decide = Dispatch::new(context, "decide", decide, &[&partials, work], 1);
            Ok(Self { partials, measure, decide })
        })
    }

    fn bytes(chunks: u32) -> u64 {
        4 * PARTIAL_WORDS as u64 * u64::from(chunks)
    }

    /// Records both passes.
    pub(super) fn record(&self, context: &Context, encoder: &mut wgpu::CommandEncoder) {
        Dispatch::record(context, encoder, &self.measure);
        Dispatch::record(context, encoder, [&self.decide]);
    }

    /// Dispatches of both passes.
    pub(super) fn dispatches(&self) -> usize {
        self.measure.len() + 1
    }

    /// Where the partial sums lie.
    pub(super) fn partials(&self) -> &wgpu::Buffer {
        &self.partials
    }

    /// What was found in each chunk, out of the partial sums' bytes.
    pub(super) fn found(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
        bytes.chunks_exact(4 * PARTIAL_WORDS).map(|partial| {
            let word = partial[12..16].as_chunks().0.first().copied();
            word.map_or(0, u32::from_le_bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Chunks anywhere in the longest window that there may be, against arithmetic that cannot overflow.
        #[test]
        fn chunks_are_those_of_unlimited_arithmetic(
            at in 0usize..(i32::MAX as usize / 4 / 64),
            gradient_at in 0usize..(i32::MAX as usize / 4 / 64),
            len in 0usize..50_000,
            chunk in 1usize..2000,
        ) {
            let (at, gradient_at, chunk) = (64 * at, 64 * gradient_at, 4 * chunk);
            let mut table = Table::default();
            table.push(chunk, at, gradient_at, len, 7);
            let mut next = 0u128;
            for &[start4, part, row, gradient4] in &table.chunks {
                prop_assert_eq!(u128::from(start4) * 4, at as u128 + next);
                prop_assert_eq!(u128::from(gradient4) * 4, gradient_at as u128 + next);
                prop_assert!(part as usize <= chunk && part > 0 && row == 7);
                next += u128::from(part);
            }
            prop_assert_eq!(next, len as u128);
        }
    }
}
