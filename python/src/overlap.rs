//! Which memory a step writes, by address: to find arrays that overlap without comparing all pairs.

use roptim::tensor::RawTensor;

use crate::arrays::extent;

/// A byte range that is written, with the parameter it belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Interval {
    low: usize,
    high: usize,
    pub(crate) index: usize,
    pub(crate) is_slot: bool,
}

impl Interval {
    /// The range of an array.
    pub(crate) fn of(raw: &RawTensor, index: usize, is_slot: bool) -> Self {
        let (low, high) = extent(raw);
        Self { low, high, index, is_slot }
    }
}

/// Ranges sorted by their start; `reach[i]` is the furthest end up to i.
#[derive(Default, Clone)]
pub(crate) struct Map {
    intervals: Vec<Interval>,
    reach: Vec<usize>,
}

impl Map {
    /// Empty ranges are left out.
    pub(crate) fn new(mut intervals: Vec<Interval>) -> Self {
        intervals.retain(|i| i.low < i.high);
        // A sort that finds what is in order already: ranges are added to a map of many, group by group.
        intervals.sort_by_key(|i| i.low);
        let furthest = |furthest: &mut usize, interval: &Interval| {
            *furthest = interval.high.max(*furthest);
            Some(*furthest)
        };
        let reach = intervals.iter().scan(0, furthest).collect();
        Self { intervals, reach }
    }

    /// With more ranges, all at once: one after the other would take the square of the time.
    pub(crate) fn with(mut self, added: impl Iterator<Item = Interval>) -> Self {
        self.intervals.extend(added);
        Self::new(self.intervals)
    }

    /// Every range that meets the array's.
    pub(crate) fn meeting(&self, raw: &RawTensor) -> impl Iterator<Item = &Interval> {
        let (low, high) = extent(raw);
        let end = if low < high { self.intervals.partition_point(|i| i.low < high) } else { 0 };
        let near = (0..end).rev().take_while(move |&i| self.reach[i] > low);
        near.map(|i| &self.intervals[i]).filter(move |i| i.high > low)
    }
}
