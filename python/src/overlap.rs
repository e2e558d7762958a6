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
        intervals.sort_unstable_by_key(|i| i.low);
        let reach = vec![0; intervals.len()];
        let mut map = Self { intervals, reach };
        map.extend_reach(0);
        map
    }

    fn extend_reach(&mut self, from: usize) {
        let mut furthest = if from > 0 { self.reach[from - 1] } else { 0 };
        for (reach, interval) in self.reach[from..].iter_mut().zip(&self.intervals[from..]) {
            furthest = furthest.max(interval.high);
            *reach = furthest;
        }
    }

    /// Adds a range.
    pub(crate) fn insert(&mut self, interval: Interval) {
        if interval.low == interval.high {
            return;
        }
        let at = self.intervals.partition_point(|i| i.low <= interval.low);
        self.intervals.insert(at, interval);
        self.reach.insert(at, 0);
        self.extend_reach(at);
    }

    /// Every range that meets the array's.
    pub(crate) fn meeting(&self, raw: &RawTensor) -> impl Iterator<Item = &Interval> {
        let (low, high) = extent(raw);
        let end = if low < high { self.intervals.partition_point(|i| i.low < high) } else { 0 };
        let near = (0..end).rev().take_while(move |&i| self.reach[i] > low);
        near.map(|i| &self.intervals[i]).filter(move |i| i.high > low)
    }
}
