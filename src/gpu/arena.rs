//! Where tensors lie on the device: lines of elements, one for each storage type of parameters.
//!
//! Every tensor is padded to [`ALIGN`] elements, so that it can be copied alone and no vec4 straddles two tensors;
//! the padding stays zero. A line is cut into windows no longer than one binding may be. For each role there is one
//! buffer to a window, made when it is first needed. A tensor that does not fit into the rest of a window goes on in
//! the next; or, for rules that see whole tensors, begins there, and its slots, which have lengths of their own, lie
//! in the same window of theirs.

use std::collections::{BTreeMap, BTreeSet};

use super::context::Context;
use crate::error::{Error, ErrorKind, Result};
use crate::real::Dtype;
use crate::rule::MAX_SLOTS;

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
    /// Of a whole tensor: the first element in the window and the length of each slot. Those of others lie where
    /// the parameter does.
    slots: Option<[(usize, usize); MAX_SLOTS]>,
}

/// How far the whole tensors of one window reach.
#[derive(Debug, Clone, Copy, Default)]
struct Ends {
    parameter: usize,
    slots: [usize; MAX_SLOTS],
}

/// The lines.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Elements of a window, a multiple of [`ALIGN`].
    window: usize,
    tensors: Vec<Tensor>,
    /// Elements of each line.
    totals: BTreeMap<Dtype, usize>,
    /// Of windows with whole tensors.
    ends: BTreeMap<Window, Ends>,
}

impl Layout {
    pub(super) fn new(window: usize) -> Self {
        let window = (window / ALIGN).max(1) * ALIGN;
        Self { window, tensors: Vec::new(), totals: BTreeMap::new(), ends: BTreeMap::new() }
    }

    /// Elements of a window.
    pub(super) fn window(&self) -> usize {
        self.window
    }

    /// The same tensors with other windows; `None` where a whole tensor would not fit into one.
    pub(super) fn rewindowed(&self, window: usize) -> Option<Self> {
        let mut new = Self::new(window);
        for tensor in &self.tensors {
            match tensor.slots {
                None => new.push(tensor.parameter, tensor.len)?,
                Some(slots) => new.push_whole(tensor.parameter, tensor.len, slots.map(|(_, len)| len))?,
            }
        }
        Some(new)
    }

    /// Adds a tensor; says so if the line would be longer than memory.
    pub(super) fn push(&mut self, parameter: Dtype, len: usize) -> Option<()> {
        let total = self.totals.entry(parameter).or_insert(0);
        let end = len.checked_next_multiple_of(ALIGN).and_then(|n| n.checked_add(*total));
        let end = end.filter(|&end| end <= isize::MAX as usize / 4)?;
        self.tensors.push(Tensor { parameter, first: *total, len, slots: None });
        *total = end;
        Some(())
    }

    /// Adds a tensor that lies within one window, with slots of these lengths; `None` where it is too long.
    pub(super) fn push_whole(&mut self, parameter: Dtype, len: usize, slots: [usize; MAX_SLOTS]) -> Option<()> {
        let lengths = || slots.iter().chain([&len]);
        if lengths().any(|len| len.checked_next_multiple_of(ALIGN).is_none_or(|padded| padded > self.window)) {
            return None;
        }
        let total = self.totals.get(&parameter).copied().unwrap_or(0);
        let mut window = Window { parameter, index: total / self.window };
        let mut ends = self.ends.get(&window).copied().unwrap_or_default();
        let fits = |end: usize, len: usize| end + len.next_multiple_of(ALIGN) <= self.window;
        if !fits(ends.parameter, len) || !ends.slots.iter().zip(slots).all(|(&end, len)| fits(end, len)) {
            (window.index, ends) = (window.index + 1, Ends::default());
        }
        let first = window.index.checked_mul(self.window)?.checked_add(ends.parameter)?;
        let total = first.checked_add(len.next_multiple_of(ALIGN)).filter(|&end| end <= isize::MAX as usize / 4)?;
        let places = std::array::from_fn(|k| (ends.slots[k], slots[k]));
        ends.parameter += len.next_multiple_of(ALIGN);
        ends.slots.iter_mut().zip(slots).for_each(|(end, len)| *end += len.next_multiple_of(ALIGN));
        self.tensors.push(Tensor { parameter, first, len, slots: Some(places) });
        self.totals.insert(parameter, total);
        self.ends.insert(window, ends);
        Some(())
    }

    /// Forgets the tensors that were added last, but so many.
    pub(super) fn truncate(&mut self, count: usize) {
        if !self.ends.is_empty() {
            let mut fewer = self.clone();
            fewer.tensors.truncate(count);
            // They fitted before.
            *self = fewer.rewindowed(self.window).unwrap_or_else(|| Self::new(self.window));
            return;
        }
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
        let Tensor { parameter, first, len, .. } = self.tensors[index];
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

    /// Elements of slot k of a tensor.
    pub(super) fn slot_len(&self, index: usize, k: usize) -> usize {
        let tensor = &self.tensors[index];
        tensor.slots.map_or(tensor.len, |slots| slots[k].1)
    }

    /// Where a whole tensor's slots begin in its window.
    pub(super) fn slots_at(&self, index: usize) -> [usize; MAX_SLOTS] {
        self.tensors[index].slots.unwrap_or_default().map(|(at, _)| at)
    }

    /// The parts of slot k of a tensor, as [`Layout::segments`] has those of the tensor.
    pub(super) fn slot_segments(
        &self,
        index: usize,
        k: usize,
        longest: usize,
    ) -> impl Iterator<Item = Segment> + use<> {
        let Tensor { parameter, first, slots, .. } = self.tensors[index];
        let spanning = slots.is_none().then(|| self.segments(index, longest));
        let window = Window { parameter, index: first / self.window };
        let longest = longest.max(ALIGN) / ALIGN * ALIGN;
        let whole = slots.map(|slots| slots[k]).into_iter().flat_map(move |(at, len)| {
            let part = move |start: usize| Segment { window, at: at + start, start, len: (len - start).min(longest) };
            (0..len).step_by(longest).map(part)
        });
        spanning.into_iter().flatten().chain(whole)
    }

    /// Bytes of a window's buffer.
    fn bytes(&self, role: Role, window: Window) -> u64 {
        if let Some(ends) = self.ends.get(&window) {
            let elements = if let Role::Slot(k) = role { ends.slots[k] } else { ends.parameter };
            // A buffer is bound even if no tensor has such a slot.
            return (elements.max(ALIGN) * role.dtype(window.parameter).size()) as u64;
        }
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

        #[test]
        fn whole_tensors_and_their_slots_lie_in_one_window(
            window in 64usize..2000,
            tensors in prop::collection::vec((0usize..900, 0usize..900, 0usize..900, 0usize..3), 1..20),
            kept in 0usize..20,
        ) {
            let mut layout = Layout::new(window);
            let mut taken: BTreeMap<(Role, Window), Vec<bool>> = BTreeMap::new();
            let mut placed = Vec::new();
            for &(len, rows, columns, of) in &tensors {
                let slots = [rows, 0, columns, 0];
                let too_long = [len, rows, columns].iter().any(|n| n.next_multiple_of(ALIGN) > layout.window);
                let before = layout.clone();
                prop_assert_eq!(layout.push_whole(STORED[of], len, slots).is_none(), too_long);
                if too_long {
                    prop_assert_eq!(layout.tensors.len(), before.tensors.len());
                } else {
                    placed.push((len, slots));
                }
            }
            for (index, &(len, slots)) in placed.iter().enumerate() {
                let of_parameter: Vec<Segment> = layout.segments(index, usize::MAX).collect();
                prop_assert_eq!(of_parameter.len(), usize::from(len > 0));
                let mut all: Vec<(Role, Segment)> = of_parameter.iter().map(|s| (Role::Parameter, *s)).collect();
                for (k, &slot) in slots.iter().enumerate() {
                    prop_assert_eq!(layout.slot_len(index, k), slot);
                    let found: Vec<Segment> = layout.slot_segments(index, k, 100).collect();
                    prop_assert_eq!(found.iter().map(|s| s.len).sum::<usize>(), slot);
                    prop_assert!(found.iter().all(|s| of_parameter.iter().all(|p| p.window == s.window)));
                    prop_assert!(found.first().is_none_or(|s| s.at == layout.slots_at(index)[k]));
                    all.extend(found.into_iter().map(|s| (Role::Slot(k), s)));
                }
                for (role, segment) in all {
                    let bytes = layout.bytes(role, segment.window);
                    prop_assert!(segment.offset(role) + segment.padded(role) as u64 <= bytes);
                    prop_assert!(segment.at + segment.len <= layout.window && segment.at % ALIGN == 0);
                    let line = taken.entry((role, segment.window)).or_insert_with(|| vec![false; layout.window]);
                    for place in &mut line[segment.at..][..segment.len] {
                        prop_assert!(!std::mem::replace(place, true));
                    }
                }
            }
            let mut fewer = Layout::new(window);
            let kept = kept.min(placed.len());
            for (tensor, &(len, slots)) in layout.tensors.iter().zip(&placed).take(kept) {
                fewer.push_whole(tensor.parameter, len, slots).unwrap();
            }
            layout.truncate(kept);
            prop_assert_eq!(format!("{layout:?}"), format!("{fewer:?}"));
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
