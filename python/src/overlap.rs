//! Which memory a step writes, by address: to find arrays that overlap without comparing all pairs.

use std::collections::BTreeMap;

use roptim::tensor::RawTensor;

/// The byte range that the elements lie in.
fn extent(raw: &RawTensor) -> (usize, usize) {
    let (mut low, mut high) = (raw.ptr as usize, raw.ptr as usize);
    if raw.len == 0 {
        return (low, high);
    }
    match &raw.strides {
        None => high += raw.len * raw.dtype.size(),
        Some(strides) => {
            for (&axis, &step) in strides.shape.iter().zip(&strides.bytes) {
                let reach = step * (axis as isize - 1);
                if reach < 0 {
                    low = low.wrapping_add_signed(reach);
                } else {
                    high = high.wrapping_add_signed(reach);
                }
            }
            high += raw.dtype.size();
        }
    }
    (low, high)
}

/// Memory in pieces of `piece` bytes, each a multiple of `grid` after the first, as that of a matrix's column. A grid of
/// 0 is one piece.
#[derive(Clone, Copy)]
struct Comb {
    start: usize,
    piece: usize,
    grid: usize,
}

impl Comb {
    /// Combs that have all of an array's bytes, and others. Each takes some of the shortest steps for one piece, with what
    /// lies between; the first one all.
    fn all(raw: &RawTensor) -> Vec<Self> {
        let (start, end) = extent(raw);
        let axes = raw.strides.iter().flat_map(|strides| strides.shape.iter().zip(&strides.bytes));
        let axes = axes.filter(|(n, _)| **n > 1).map(|(&n, &step)| (step.unsigned_abs(), n));
        let mut axes: Vec<(usize, usize)> = axes.collect();
        axes.sort_unstable_by(|a, b| b.cmp(a));
        let (mut piece, mut grid) = (end - start, 0);
        let mut combs = vec![Self { start, piece, grid }];
        for (step, n) in axes {
            piece = piece.saturating_sub(step * (n - 1));
            grid = common(grid, step);
            combs.push(Self { start, piece, grid });
        }
        combs
    }

    /// The one that leaves most to others.
    fn of(raw: &RawTensor) -> Self {
        let (start, end) = extent(raw);
        let whole = Self { start, piece: end - start, grid: 0 };
        if raw.strides.is_none() {
            return whole;
        }
        let share = |comb: &Self| comb.piece as f64 / comb.grid as f64;
        let combs = Self::all(raw).into_iter().filter(|comb| comb.piece < comb.grid);
        combs.min_by(|a, b| share(a).total_cmp(&share(b))).unwrap_or(whole)
    }

    /// Whether the two lie in different places of one grid, and so share no byte.
    fn interleaves(self, other: Self) -> bool {
        let grid = common(self.grid, other.grid);
        if grid == 0 {
            return false;
        }
        let apart = (other.start as i128 - self.start as i128).rem_euclid(grid as i128) as usize;
        self.piece <= apart && other.piece <= grid - apart
    }

    /// Where in a grid it lies that its own is a multiple of: one range, or two where it goes over the edge.
    fn places(self, grid: usize) -> impl Iterator<Item = (usize, usize)> {
        let low = self.start % grid;
        let places = match low + self.piece {
            _ if self.piece >= grid => [(0, grid), (0, 0)],
            high if high <= grid => [(low, high), (0, 0)],
            high => [(low, grid), (0, high - grid)],
        };
        places.into_iter().filter(|(low, high)| low < high)
    }
}

/// The greatest common divisor; with 0 the other number.
fn common(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Whether two arrays lie in different places of one grid, as the columns of a matrix do. What is not seen here may
/// still share nothing.
pub(crate) fn interleave(a: &RawTensor, b: &RawTensor) -> bool {
    let (a, b) = (Comb::all(a), Comb::all(b));
    a.iter().any(|a| b.iter().any(|b| a.interleaves(*b)))
}

/// A byte range that is written, with the parameter it belongs to.
#[derive(Clone, Copy)]
pub(crate) struct Interval {
    extent: (usize, usize),
    comb: Comb,
    pub(crate) index: usize,
    pub(crate) is_slot: bool,
}

impl Interval {
    /// The range of an array.
    pub(crate) fn of(raw: &RawTensor, index: usize, is_slot: bool) -> Self {
        Self { extent: extent(raw), comb: Comb::of(raw), index, is_slot }
    }
}

/// Things with a range each, sorted by its start; `reach[i]` is the furthest end up to i.
#[derive(Clone)]
struct Ranges<T> {
    sorted: Vec<((usize, usize), T)>,
    reach: Vec<usize>,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { sorted: Vec::new(), reach: Vec::new() }
    }
}

impl<T> Ranges<T> {
    fn new(mut sorted: Vec<((usize, usize), T)>) -> Self {
        // A sort that finds what is in order already: ranges are added to a map of many, group by group.
        sorted.sort_by_key(|((low, _), _)| *low);
        let furthest = |furthest: &mut usize, ((_, high), _): &((usize, usize), T)| {
            *furthest = (*high).max(*furthest);
            Some(*furthest)
        };
        let reach = sorted.iter().scan(0, furthest).collect();
        Self { sorted, reach }
    }

    /// Every thing whose range meets this one.
    fn meeting(&self, (low, high): (usize, usize)) -> impl Iterator<Item = &T> {
        let end = if low < high { self.sorted.partition_point(|((start, _), _)| *start < high) } else { 0 };
        let near = (0..end).rev().take_while(move |&i| self.reach[i] > low);
        near.map(|i| &self.sorted[i]).filter(move |((_, end), _)| *end > low).map(|(_, thing)| thing)
    }
}

impl Ranges<Interval> {
    fn by_extent(intervals: impl IntoIterator<Item = Interval>) -> Self {
        Self::new(intervals.into_iter().map(|interval| (interval.extent, interval)).collect())
    }
}

/// Arrays in pieces whose ranges hang together, as those of a matrix's columns: each meets all others, so they are told
/// apart by their places in a grid that they have in common.
#[derive(Clone)]
struct Weave {
    grid: usize,
    all: Ranges<Interval>,
    places: Ranges<Ranges<Interval>>,
}

impl Weave {
    fn new(grid: usize, intervals: Vec<Interval>) -> Self {
        let mut places: BTreeMap<(usize, usize), Vec<Interval>> = BTreeMap::new();
        for interval in &intervals {
            for place in interval.comb.places(grid) {
                places.entry(place).or_default().push(*interval);
            }
        }
        let places = places.into_iter().map(|(place, intervals)| (place, Ranges::by_extent(intervals)));
        Self { grid, places: Ranges::new(places.collect()), all: Ranges::by_extent(intervals) }
    }

    /// Several where some have a grid that would take too much from the others'.
    fn of(intervals: Vec<Interval>) -> impl Iterator<Item = Self> {
        let mut by_grid: Vec<(usize, Vec<Interval>)> = Vec::new();
        for interval in intervals {
            let grid = interval.comb.grid;
            match by_grid.iter_mut().find(|(other, _)| common(*other, grid) >= grid.max(*other) / 4) {
                Some((other, members)) => {
                    *other = common(*other, grid);
                    members.push(interval);
                }
                None => by_grid.push((grid, vec![interval])),
            }
        }
        by_grid.into_iter().map(|(grid, intervals)| Self::new(grid, intervals))
    }

    fn extent(&self) -> (usize, usize) {
        let low = self.all.sorted.first().map_or(0, |((low, _), _)| *low);
        (low, self.all.reach.last().copied().unwrap_or(low))
    }

    /// Every range that may share memory with another array.
    fn meeting(&self, extent: (usize, usize), comb: Comb) -> impl Iterator<Item = &Interval> {
        let (own, other) = if comb.grid.is_multiple_of(self.grid) { (Some(self), None) } else { (None, Some(self)) };
        let own = own.into_iter().flat_map(move |weave| {
            comb.places(weave.grid).flat_map(|place| weave.places.meeting(place)).flat_map(move |at| at.meeting(extent))
        });
        own.chain(other.into_iter().flat_map(move |weave| weave.all.meeting(extent)))
    }
}

/// Ranges to be found by the arrays that meet them. Arrays in one memory whose grids have little in common are compared
/// pair by pair; all else is sorted.
#[derive(Default, Clone)]
pub(crate) struct Map {
    /// Arrays in one piece.
    whole: Ranges<Interval>,
    woven: Ranges<Weave>,
}

impl Map {
    /// Empty ranges are left out.
    pub(crate) fn new(intervals: Vec<Interval>) -> Self {
        Self::default().with(intervals.into_iter())
    }

    /// With more ranges, all at once: one after the other would take the square of the time.
    pub(crate) fn with(self, added: impl Iterator<Item = Interval>) -> Self {
        let mut whole = self.whole.sorted;
        let mut woven: Vec<Interval> = self
            .woven
            .sorted
            .into_iter()
            .flat_map(|(_, weave)| weave.all.sorted)
            .map(|(_, interval)| interval)
            .collect();
        for interval in added.filter(|Interval { extent: (low, high), .. }| low < high) {
            if interval.comb.grid == 0 { whole.push((interval.extent, interval)) } else { woven.push(interval) }
        }
        woven.sort_by_key(|interval| interval.extent.0);
        let mut reach = 0;
        let mut weaves: Vec<Vec<Interval>> = Vec::new();
        for interval in woven {
            match weaves.last_mut().filter(|_| interval.extent.0 < reach) {
                Some(weave) => weave.push(interval),
                None => weaves.push(vec![interval]),
            }
            reach = reach.max(interval.extent.1);
        }
        let weaves = weaves.into_iter().flat_map(Weave::of).map(|weave| (weave.extent(), weave));
        Self { whole: Ranges::new(whole), woven: Ranges::new(weaves.collect()) }
    }

    /// Every range that may share memory with the array; some twice.
    pub(crate) fn meeting(&self, raw: &RawTensor) -> impl Iterator<Item = &Interval> {
        let (extent, comb) = (extent(raw), Comb::of(raw));
        let woven = self.woven.meeting(extent).flat_map(move |weave| weave.meeting(extent, comb));
        self.whole.meeting(extent).chain(woven)
    }
}
