//! Where tensors lie on the device: lines of elements, one for each storage type of parameters.
//!
//! Every tensor is padded to [`ALIGN`] elements, so that it can be copied alone and no vec4 straddles two tensors;
//! the padding stays zero. A line is cut into windows no longer than one binding may be. For each role there is one
//! buffer to a window, made when it is first needed. A tensor that does not fit into the rest of a window goes on in
//! the next.

use std::collections::{BTreeMap, BTreeSet};

use super::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::real::Dtype;

/// Elements that tensors are padded to.
pub(super) const ALIGN: usize = 64;

/// What an arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Parameter,
    /// Gradients from the host, that store this.
    Gradient(Dtype),
    /// Sums of gradients.
    Sum,
    Slot(usize),
}

impl Role {
    fn label(self) -> &'static str {
        match self {
            Self::Parameter => "parameters",
            Self::Gradient(_) => "gradients",
            Self::Sum => "sums of gradients",
            Self::Slot(_) => "slot",
        }
    }

    /// What is stored for parameters that store `parameter`.
    pub(super) fn dtype(self, parameter: Dtype) -> Dtype {
        match self {
            Self::Parameter => parameter,
            Self::Gradient(dtype) => dtype,
            Self::Sum | Self::Slot(_) => Dtype::F32,
        }
    }
}

/// One window of the line of parameters that store this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Window {
    pub(super) parameter: Dtype,
    pub(super) index: usize,
}

/// Part of one tensor inside one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) window: Window,
    /// First element in the window.
    pub(super) at: usize,
    /// First element in the tensor.
    pub(super) start: usize,
    /// Elements without padding.
    pub(super) len: usize,
}

impl Segment {
    /// Where it begins in the buffer of a role.
    pub(super) fn offset(self, role: Role) -> u64 {
        (self.at * role.dtype(self.window.parameter).size()) as u64
    }

    /// Its bytes with its padding.
    pub(super) fn padded(self, role: Role) -> usize {
        self.len.next_multiple_of(ALIGN) * role.dtype(self.window.parameter).size()
    }
}

/// A tensor's place.
#[derive(Debug, Clone, Copy)]
struct Tensor {
    parameter: Dtype,
    first: usize,
    len: usize,
}

/// The lines.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Elements of a window, a multiple of [`ALIGN`].
    window: usize,
    tensors: Vec<Tensor>,
    /// Elements of each line.
    totals: BTreeMap<Dtype, usize>,
}

impl Layout {
    pub(super) fn new(window: usize) -> Self {
        Self { window: (window / ALIGN).max(1) * ALIGN, tensors: Vec::new(), totals: BTreeMap::new() }
    }

    /// The same tensors with other windows.
    pub(super) fn rewindowed(&self, window: usize) -> Self {
        Self { tensors: self.tensors.clone(), totals: self.totals.clone(), ..Self::new(window) }
    }

    /// Adds a tensor; says so if the line would be longer than memory.
    pub(super) fn push(&mut self, parameter: Dtype, len: usize) -> Option<()> {
        let total = self.totals.entry(parameter).or_insert(0);
        let end = len.checked_next_multiple_of(ALIGN).and_then(|n| n.checked_add(*total));
        let end = end.filter(|&end| end <= isize::MAX as usize / 4)?;
        self.tensors.push(Tensor { parameter, first: *total, len });
        *total = end;
        Some(())
    }

    /// Forgets the tensors that were added last, but so many.
    pub(super) fn truncate(&mut self, count: usize) {
        for tensor in self.tensors.drain(count.min(self.tensors.len())..).rev() {
            self.totals.insert(tensor.parameter, tensor.first);
        }
    }

    /// Whether its windows have so many elements.
    pub(super) fn is_of(&self, window: usize) -> bool {
        self.window == Self::new(window).window
    }

    /// The parts of a tensor, each inside one window and at most `longest` elements.
    pub(super) fn segments(&self, index: usize, longest: usize) -> impl Iterator<Item = Segment> + use<> {
        let Tensor { parameter, first, len } = self.tensors[index];
        let (window, longest) = (self.window, longest.max(ALIGN));
        let mut start = 0;
        std::iter::from_fn(move || {
            if start == len {
                return None;
            }
            let (of, at) = ((first + start) / window, (first + start) % window);
            let part = (len - start).min(window - at).min(longest / ALIGN * ALIGN);
            let segment = Segment { window: Window { parameter, index: of }, at, start, len: part };
            start += part;
            Some(segment)
        })
    }

    /// Bytes of a window's buffer.
    fn bytes(&self, role: Role, window: Window) -> u64 {
        let total = self.totals.get(&window.parameter).copied().unwrap_or(0);
        let elements = self.window.min(total - window.index * self.window);
        (elements * role.dtype(window.parameter).size()) as u64
    }
}

/// The layout and its buffers.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) layout: Layout,
    buffers: BTreeMap<(Role, Window), wgpu::Buffer>,
    /// Counts changes of the buffers: bind groups made before are stale.
    pub(super) generation: u64,
}

impl Arena {
    pub(super) fn new(window: usize) -> Self {
        Self { layout: Layout::new(window), buffers: BTreeMap::new(), generation: 0 }
    }

    pub(super) fn is_unallocated(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        self.buffers.values().map(wgpu::Buffer::size).sum()
    }

    /// A buffer that [`Arena::ensure`] made.
    pub(super) fn buffer(&self, place: &str, role: Role, window: Window) -> Result<&wgpu::Buffer> {
        let found = self.buffers.get(&(role, window));
        found.ok_or_else(|| Error::plain(ErrorKind::Internal, format!("{place}: {} has no memory", role.label())))
    }

    /// Makes the buffers that are missing, and longer ones where tensors were added behind; contents stay,
    /// the rest is zero. On an error nothing has changed.
    pub(super) fn ensure(&mut self, context: &Context, place: &str, wanted: &BTreeSet<(Role, Window)>) -> Result<()> {
        let is_missing = |&(role, window): &(Role, Window)| {
            let found = self.buffers.get(&(role, window));
            found.is_none_or(|buffer| buffer.size() < self.layout.bytes(role, window))
        };
        let missing: Vec<(Role, Window)> = wanted.iter().copied().filter(is_missing).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let bytes = missing.iter().map(|&(role, window)| self.layout.bytes(role, window)).sum();
        context.refuse_beyond_memory(place, bytes)?;
        let made = context.scoped(place, || {
            let mut encoder = context.device.create_command_encoder(&Default::default());
            let mut made = Vec::with_capacity(missing.len());
            for &(role, window) in &missing {
                let mut usage =
                    wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
                if context.shares_memory && matches!(role, Role::Parameter | Role::Gradient(_)) {
                    usage |= wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::MAP_READ;
                }
                let buffer = context.buffer(role.label(), self.layout.bytes(role, window), usage, false);
                if let Some(old) = self.buffers.get(&(role, window)) {
                    encoder.copy_buffer_to_buffer(old, 0, &buffer, 0, old.size());
                }
                made.push(buffer);
            }
            context.queue.submit([encoder.finish()]);
            Ok(made)
        })?;
        self.buffers.extend(missing.into_iter().zip(made));
        self.generation += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STORED: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

    proptest! {
        #[test]
        fn segments_cover_each_tensor_once_inside_windows(
            window in 1usize..1000,
            longest in 1usize..2000,
            tensors in prop::collection::vec((0usize..900, 0usize..3), 1..20),
        ) {
            let mut layout = Layout::new(window);
            tensors.iter().for_each(|&(len, of)| layout.push(STORED[of], len).unwrap());
            let mut taken: BTreeMap<Dtype, Vec<bool>> =
                layout.totals.iter().map(|(&dtype, &total)| (dtype, vec![false; total])).collect();
            for (index, &(len, of)) in tensors.iter().enumerate() {
                let mut next = 0;
                for segment in layout.segments(index, longest) {
                    prop_assert!(segment.start == next && segment.len > 0 && segment.window.parameter == STORED[of]);
                    prop_assert!(segment.at % ALIGN == 0 && segment.at + segment.len <= layout.window);
                    for role in [Role::Parameter, Role::Gradient(Dtype::F32), Role::Slot(0)] {
                        let end = segment.offset(role) + segment.padded(role) as u64;
                        prop_assert!(end <= layout.bytes(role, segment.window) && segment.offset(role) % 128 == 0);
                    }
                    next += segment.len;
                    let line = taken.get_mut(&STORED[of]).unwrap();
                    for place in &mut line[segment.window.index * layout.window + segment.at..][..segment.len] {
                        prop_assert!(!std::mem::replace(place, true));
                    }
                }
                prop_assert_eq!(next, len);
            }
        }

        /// Tensors of any size that memory can name, against arithmetic that cannot overflow.
        #[test]
        fn indices_are_those_of_unlimited_arithmetic(
            window in (1usize << 10)..(1 << 29),
            lengths in prop::collection::vec(0usize..(1 << 40), 1..6),
        ) {
            let mut layout = Layout::new(window);
            let mut first = 0u128;
            for (index, &len) in lengths.iter().enumerate() {
                layout.push(Dtype::F32, len).unwrap();
                let mut next = 0u128;
                // What one binding may span at most has indices of vec4s and bytes that the shaders' types hold.
                for segment in layout.segments(index, usize::MAX).take(50) {
                    let absolute = first + next;
                    let wide = layout.window as u128;
                    prop_assert_eq!((segment.window.index as u128, segment.at as u128), (absolute / wide, absolute % wide));
                    prop_assert_eq!(u128::from(segment.offset(Role::Slot(0))), 4 * (absolute % wide));
                    prop_assert!((segment.at as u128 + segment.len as u128).div_ceil(4) < 1 << 32);
                    next += segment.len as u128;
                }
                first += (len as u128).next_multiple_of(ALIGN as u128);
            }
            prop_assert_eq!(layout.totals[&Dtype::F32] as u128, first);
            prop_assert!(layout.push(Dtype::F32, usize::MAX).is_none() && layout.push(Dtype::F32, usize::MAX / 4).is_none());
        }
    }
}
