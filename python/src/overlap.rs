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
    fn of(raw: &RawTensor) -> Self {
        let (start, item) = (extent(raw).0, raw.dtype.size());
        let Some(strides) = &raw.strides else { return Self { start, piece: raw.len * item, grid: 0 } };
        let axes = strides.shape.iter().zip(&strides.bytes).filter(|(n, _)| **n > 1);
        let mut axes: Vec<(usize, usize)> = axes.map(|(&n, &step)| (step.unsigned_abs(), n)).collect();
        axes.sort_unstable();
        let (mut piece, mut grid) = (item, 0);
        for (step, n) in axes {
            if step == piece {
                piece *= n;
            } else {
                grid = common(grid, step);
            }
        }
        Self { start, piece, grid }
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

    /// Where in its grid it lies: one range, or two where it goes over the edge.
    fn places(self) -> impl Iterator<Item = (usize, usize)> {
        let Self { start, piece, grid } = self;
        let low = start % grid;
        let places = match low + piece {
            _ if piece >= grid => [(0, grid), (0, 0)],
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
    Comb::of(a).interleaves(Comb::of(b))
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

/// The arrays of one grid: the columns of a matrix all meet in their byte ranges, so they are told apart by their place
/// in the grid first.
#[derive(Clone)]
struct Weave {
    all: Ranges<Interval>,
    places: Ranges<Ranges<Interval>>,
}

impl Weave {
    fn new(intervals: &[Interval]) -> Self {
        let mut places: BTreeMap<(usize, usize), Vec<Interval>> = BTreeMap::new();
        for interval in intervals {
            for place in interval.comb.places() {
                places.entry(place).or_default().push(*interval);
            }
        }
        let places = places.into_iter().map(|(place, intervals)| (place, Ranges::by_extent(intervals)));
        Self { all: Ranges::by_extent(intervals.iter().copied()), places: Ranges::new(places.collect()) }
    }

    /// Every range that may share memory with another array of the grid.
    fn meeting(&self, extent: (usize, usize), comb: Comb) -> impl Iterator<Item = &Interval> {
        let places = comb.places().flat_map(|place| self.places.meeting(place));
        places.flat_map(move |in_place| in_place.meeting(extent))
    }
}

/// Ranges to be found by the arrays that meet them.
#[derive(Default, Clone)]
pub(crate) struct Map {
    /// Arrays in one piece.
    whole: Ranges<Interval>,
    /// The others, by grid.
    woven: BTreeMap<usize, Weave>,
}

impl Map {
    /// Empty ranges are left out.
    pub(crate) fn new(intervals: Vec<Interval>) -> Self {
        Self::default().with(intervals.into_iter())
    }

    /// With more ranges, all at once: one after the other would take the square of the time.
    pub(crate) fn with(self, added: impl Iterator<Item = Interval>) -> Self {
        let mut whole = self.whole.sorted;
        let mut woven: BTreeMap<usize, Vec<Interval>> = BTreeMap::new();
        for (grid, weave) in self.woven {
            woven.insert(grid, weave.all.sorted.into_iter().map(|(_, interval)| interval).collect());
        }
        for interval in added.filter(|Interval { extent: (low, high), .. }| low < high) {
            match interval.comb.grid {
                0 => whole.push((interval.extent, interval)),
                grid => woven.entry(grid).or_default().push(interval),
            }
        }
        let woven = woven.into_iter().map(|(grid, intervals)| (grid, Weave::new(&intervals))).collect();
        Self { whole: Ranges::new(whole), woven }
    }

    /// Every range that may share memory with the array; some twice.
    pub(crate) fn meeting(&self, raw: &RawTensor) -> impl Iterator<Item = &Interval> {
        let (extent, comb) = (extent(raw), Comb::of(raw));
        let woven = self.woven.iter().flat_map(move |(grid, weave)| {
            let (own, other) = if *grid == comb.grid { (Some(weave), None) } else { (None, Some(weave)) };
            let own = own.into_iter().flat_map(move |weave| weave.meeting(extent, comb));
            own.chain(other.into_iter().flat_map(move |weave| weave.all.meeting(extent)))
        });
        self.whole.meeting(extent).chain(woven)
    }
}
