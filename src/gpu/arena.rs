//! Where tensors lie on the device: one arena per role, all with the same layout.
//!
//! The layout is one line of elements. Every tensor is padded to [`ALIGN`] elements (256 bytes), so that
//! it can be copied or bound alone and no vec4 straddles two tensors; the padding stays zero. The line is
//! cut into windows no longer than one binding may be; each window of each role is one buffer, made when
//! it is first needed. A tensor that does not fit into the rest of a window goes on in the next.

use std::collections::BTreeSet;

use super::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::rule::MAX_SLOTS;

/// Elements that tensors are padded to.
pub(super) const ALIGN: usize = 64;

/// What an arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Parameter,
    Gradient,
    Slot(usize),
}

impl Role {
    fn index(self) -> usize {
        match self {
            Self::Parameter => 0,
            Self::Gradient => 1,
            Self::Slot(k) => 2 + k,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Parameter => "parameters",
            Self::Gradient => "gradients",
            Self::Slot(_) => "slot",
        }
    }
}

/// Part of one tensor inside one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) window: usize,
    /// First element in the window.
    pub(super) at: usize,
    /// First element in the tensor.
    pub(super) start: usize,
    /// Elements without padding.
    pub(super) len: usize,
}

/// The line of elements.
#[derive(Debug)]
pub(super) struct Layout {
    /// Elements of a window, a multiple of [`ALIGN`].
    window: usize,
    /// First element and length of each tensor.
    tensors: Vec<(usize, usize)>,
    total: usize,
}

impl Layout {
    pub(super) fn new(window: usize) -> Self {
        Self { window: (window / ALIGN).max(1) * ALIGN, tensors: Vec::new(), total: 0 }
    }

    /// The same tensors with other windows.
    pub(super) fn rewindowed(&self, window: usize) -> Self {
        Self { tensors: self.tensors.clone(), total: self.total, ..Self::new(window) }
    }

    pub(super) fn push(&mut self, len: usize) {
        self.tensors.push((self.total, len));
        self.total += len.next_multiple_of(ALIGN);
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// The parts of a tensor, each inside one window and at most `longest` elements.
    pub(super) fn segments(&self, index: usize, longest: usize) -> impl Iterator<Item = Segment> + use<> {
        let (first, len) = self.tensors[index];
        let (window, longest) = (self.window, longest.max(ALIGN));
        let mut start = 0;
        std::iter::from_fn(move || {
            if start == len {
                return None;
            }
            let (of, at) = ((first + start) / window, (first + start) % window);
            let part = (len - start).min(window - at).min(longest / ALIGN * ALIGN);
            let segment = Segment { window: of, at, start, len: part };
            start += part;
            Some(segment)
        })
    }

    /// Bytes of a window's buffers.
    fn bytes(&self, window: usize) -> u64 {
        (4 * self.window.min(self.total - window * self.window)) as u64
    }
}

/// The layout and its buffers.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) layout: Layout,
    /// By role, then window.
    buffers: [Vec<Option<wgpu::Buffer>>; 2 + MAX_SLOTS],
    /// Counts changes of the buffers: bind groups made before are stale.
    pub(super) generation: u64,
}

impl Arena {
    pub(super) fn new(window: usize) -> Self {
        Self { layout: Layout::new(window), buffers: Default::default(), generation: 0 }
    }

    pub(super) fn is_unallocated(&self) -> bool {
        self.buffers.iter().all(Vec::is_empty)
    }

    /// A buffer that [`Arena::ensure`] made.
    pub(super) fn buffer(&self, place: &str, role: Role, window: usize) -> Result<&wgpu::Buffer> {
        let found = self.buffers[role.index()].get(window).and_then(Option::as_ref);
        found.ok_or_else(|| Error::plain(ErrorKind::Internal, format!("{place}: {} has no memory", role.label())))
    }

    /// Makes the buffers that are missing, and longer ones where tensors were added behind; contents stay,
    /// the rest is zero. On an error nothing has changed.
    pub(super) fn ensure(&mut self, context: &Context, place: &str, wanted: &BTreeSet<(Role, usize)>) -> Result<()> {
        let missing: Vec<(Role, usize)> = wanted
            .iter()
            .copied()
            .filter(|&(role, window)| {
                let found = self.buffers[role.index()].get(window).and_then(Option::as_ref);
                found.is_none_or(|buffer| buffer.size() < self.layout.bytes(window))
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let made = context.scoped(place, || {
            let mut encoder = context.device.create_command_encoder(&Default::default());
            let mut made = Vec::with_capacity(missing.len());
            for &(role, window) in &missing {
                let buffer = context.buffer(role.label(), self.layout.bytes(window), usage, false);
                if let Some(old) = self.buffers[role.index()].get(window).and_then(Option::as_ref) {
                    encoder.copy_buffer_to_buffer(old, 0, &buffer, 0, old.size());
                }
                made.push(buffer);
            }
            context.queue.submit([encoder.finish()]);
            Ok(made)
        })?;
        for ((role, window), buffer) in missing.into_iter().zip(made) {
            let windows = &mut self.buffers[role.index()];
            windows.resize(windows.len().max(window + 1), None);
            windows[window] = Some(buffer);
        }
        self.generation += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_cover_each_tensor_once_inside_windows(
            window in 1usize..1000,
            longest in 1usize..2000,
            lengths in prop::collection::vec(0usize..900, 1..20),
        ) {
            let mut layout = Layout::new(window);
            lengths.iter().for_each(|&len| layout.push(len));
            let mut taken = vec![false; layout.total()];
            for (index, &len) in lengths.iter().enumerate() {
                let mut next = 0;
                for segment in layout.segments(index, longest) {
                    prop_assert!(segment.start == next && segment.len > 0);
                    prop_assert!(segment.at % ALIGN == 0 && segment.at + segment.len <= layout.window);
                    prop_assert!(4 * (segment.at + segment.len) as u64 <= layout.bytes(segment.window));
                    next += segment.len;
                    for place in &mut taken[segment.window * layout.window + segment.at..][..segment.len] {
                        prop_assert!(!std::mem::replace(place, true));
                    }
                }
                prop_assert_eq!(next, len);
            }
        }
    }
}
