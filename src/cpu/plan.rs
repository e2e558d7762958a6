//! The plan: all tensors of a step cut into pieces, packed into tasks of about one chunk each.

use std::ops::Range;

use crate::error::Result;
use crate::linear::SUM_BLOCK;
use crate::room;

/// Elements of a task: a few tasks for each thread, so that one who is late holds up nobody, of a size that is worth
/// fetching.
pub fn chunk(elements: usize, threads: usize) -> usize {
    const TASKS_PER_THREAD: usize = 8;
    (elements / (threads * TASKS_PER_THREAD)).next_multiple_of(1024).clamp(LEAST_CHUNK, 32 * 1024)
}

/// The least that [`chunk`] says.
pub const LEAST_CHUNK: usize = 4 * 1024;

/// A part of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which job.
    pub tensor: usize,
    /// First element.
    pub start: usize,
    /// Elements.
    pub len: usize,
}

impl Piece {
    /// Parts of at most a block of [`crate::linear`]'s sums, which stay in a core's cache.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Self> + use<> {
        let Self { tensor, start, len } = *self;
        let ends = start + len;
        (start..ends).step_by(SUM_BLOCK).map(move |at| Self { tensor, start: at, len: SUM_BLOCK.min(ends - at) })
    }
}

/// Pieces of all tensors, in order, and the tasks as ranges of them. Kept from step to step.
#[derive(Debug, Default)]
pub struct Plan {
    lengths: Vec<usize>,
    chunk: usize,
    align: usize,
    pieces: Vec<Piece>,
    tasks: Vec<Range<usize>>,
    elements: usize,
}

impl Plan {
    /// Makes room for so many tensors of so many elements together, in tasks of `chunk` elements or more.
    pub fn reserve(&mut self, chunk: usize, tensors: usize, elements: usize) -> Result<()> {
        const WHAT: &str = "the plan of a step";
        // Where pieces are aligned, a tensor may begin a task although the one before has room left.
        let tasks = elements / chunk + tensors + 1;
        room::reserve(&mut self.lengths, tensors, WHAT)?;
        room::reserve(&mut self.pieces, tensors + tasks, WHAT)?;
        room::reserve(&mut self.tasks, tasks, WHAT)
    }

    /// Rebuilds only if the lengths differ from the last step's. Pieces begin at multiples of `align` in their tensor;
    /// a chunk is at least that.
    pub fn update(&mut self, chunk: usize, align: usize, lengths: impl ExactSizeIterator<Item = usize> + Clone) {
        let chunk = chunk.max(align);
        if (self.chunk, self.align) == (chunk, align)
            && lengths.len() == self.lengths.len()
            && lengths.clone().eq(self.lengths.iter().copied())
        {
            return;
        }
        (self.chunk, self.align) = (chunk, align);
        self.lengths.clear();
        self.lengths.extend(lengths);
        self.pieces.clear();
        self.tasks.clear();
        self.elements = self.lengths.iter().sum();
        let (mut first, mut room) = (0, chunk);
        for (tensor, &length) in self.lengths.iter().enumerate() {
            let mut start = 0;
            while start < length {
                let rest = length - start;
                let len = if rest <= room { rest } else { room - room % align };
                if len > 0 {
                    self.pieces.push(Piece { tensor, start, len });
                }
                start += len;
                room -= len;
                if room < align.min(rest - len).max(1) {
                    self.tasks.push(first..self.pieces.len());
                    (first, room) = (self.pieces.len(), chunk);
                }
            }
        }
        if first < self.pieces.len() {
            self.tasks.push(first..self.pieces.len());
        }
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Every piece.
    pub fn all(&self) -> &[Piece] {
        &self.pieces
    }

    /// The tasks.
    pub fn tasks(&self) -> &[Range<usize>] {
        &self.tasks
    }

    /// The pieces of a task.
    pub fn pieces(&self, task: &Range<usize>) -> &[Piece] {
        &self.pieces[task.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn there_is_room_for_every_plan_of_the_tensors_and_little_more(
            least in 1usize..20, more in 0usize..50, aligns: bool, lengths in prop::collection::vec(0usize..200, 0..20),
        ) {
            let mut plan = Plan::default();
            let (tensors, elements) = (lengths.len(), lengths.iter().sum::<usize>());
            plan.reserve(least, tensors, elements).unwrap();
            let room = |plan: &Plan| [plan.lengths.capacity(), plan.pieces.capacity(), plan.tasks.capacity()];
            let before = room(&plan);
            let most = 2 * tensors + elements / least + 8;
            prop_assert!(before[0] <= tensors.max(8) && before[1..].iter().all(|&n| n <= most), "{:?}", before);
            plan.update(least + more, if aligns { least } else { 1 }, lengths.iter().copied());
            prop_assert_eq!(room(&plan), before);
        }

        #[test]
        fn every_element_is_visited_once(chunk in 1usize..50, align in 1usize..9, lengths in prop::collection::vec(0usize..200, 0..20)) {
            let mut plan = Plan::default();
            plan.update(chunk, align, lengths.iter().copied());
            let mut seen: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![0; n]).collect();
            for task in plan.tasks() {
                let size: usize = plan.pieces(task).iter().map(|p| p.len).sum();
                prop_assert!(size <= chunk.max(align) && size > 0);
                for piece in plan.pieces(task) {
                    prop_assert_eq!(piece.start % align, 0);
                    let visited = &mut seen[piece.tensor][piece.start..piece.start + piece.len];
                    visited.iter_mut().for_each(|n| *n += 1);
                }
            }
            prop_assert!(seen.iter().flatten().all(|&n| n == 1));
            prop_assert_eq!(plan.elements(), lengths.iter().sum::<usize>());
            // No task ends while there is room for what comes next: where pieces begin anywhere, all but the last are
            // full.
            if align == 1 {
                let full = plan.tasks().iter().rev().skip(1).all(|task| plan.pieces(task).iter().map(|p| p.len).sum::<usize>() == chunk);
                prop_assert!(full);
            }
        }

        #[test]
        fn a_plan_that_was_used_is_a_new_one(
            // Few, so that one step's are often those of the step before.
            steps in prop::collection::vec((1usize..4, 1usize..3, prop::collection::vec(0usize..4, 0..3)), 2..9),
        ) {
            let mut kept = Plan::default();
            for (chunk, align, lengths) in steps {
                let mut new = Plan::default();
                new.update(chunk, align, lengths.iter().copied());
                kept.update(chunk, align, lengths.iter().copied());
                prop_assert_eq!((kept.all(), kept.tasks(), kept.elements()), (new.all(), new.tasks(), new.elements()));
            }
        }
    }

    #[test]
    fn tasks_are_worth_fetching_and_not_too_few() {
        assert_eq!([0, 1, 4096, 65_536].map(|elements| chunk(elements, 1)), [4096, 4096, 4096, 8192]);
        assert_eq!([1, 2, 3, 4, 100].map(|threads| chunk(240_000, threads)), [30_720, 15_360, 10_240, 8192, 4096]);
        assert_eq!(chunk(usize::MAX / 2, 2), 32_768);
    }

    #[test]
    fn blocks_end_where_the_piece_does() {
        let blocks = |start, len| -> Vec<_> {
            Piece { tensor: 7, start, len }.blocks().map(|b| (b.tensor, b.start, b.len)).collect()
        };
        assert_eq!(blocks(SUM_BLOCK, SUM_BLOCK), [(7, SUM_BLOCK, SUM_BLOCK)]);
        assert_eq!(blocks(0, SUM_BLOCK + 1), [(7, 0, SUM_BLOCK), (7, SUM_BLOCK, 1)]);
        assert_eq!(blocks(2 * SUM_BLOCK, 5), [(7, 2 * SUM_BLOCK, 5)]);
        assert_eq!(blocks(3, 0), []);
    }
}
