//! Adafactor: Adam's second moments from their row and column means, without first moments.
//!
//! Shazeer, Stern: *Adafactor: adaptive learning rates with sublinear memory cost*, ICML 2018, Algorithms
//! 4 and 5; for each matrix G of the last two axes:
//!
//! ```text
//! ρₜ = min(lr, 1/√t),   αₜ = max(ε₂, RMS(θₜ₋₁))·ρₜ,   wₜ = 1 − β̂₂ₜ = t^c
//! Rₜ = Rₜ₋₁ + wₜ·(row means of G² − Rₜ₋₁),   Cₜ = Cₜ₋₁ + wₜ·(column means of G² − Cₜ₋₁)
//! V̂ₜ = Rₜ·Cₜ/max(mean(Rₜ), ε₁)                      fewer than two axes: V̂ₜ averages G² itself
//! Uₜ = G/√max(V̂ₜ, ε₁²)
//! θₜ = (1 − lr·λ)·θₜ₋₁ − αₜ·Uₜ/max(1, RMS(Uₜ)/d)
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | c | `beta2_decay` |
//! | ε₁, ε₂ | `eps`; ε₁ = None: the machine epsilon of the parameter's dtype |
//! | d | `d` |
//! | λ | `weight_decay` |
//! | R, C, V̂ | state `row_var`, `col_var`, `variance` |
//!
//! Deviations from the paper, torch's: ε₁ bounds the estimates from below where the paper adds it to G²,
//! and the decay is decoupled. Means and norms are summed in f64. ε₁ = None follows each parameter's own
//! dtype, where torch takes the first one's of a group.

use super::common::{MAXIMIZE, WEIGHT_DECAY, lr};
use crate::error::{Error, ErrorKind, Result};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::isa::{Loop, Loops};
use crate::linear::{
    SQUARES_BLOCK, STRETCH, SUM_BLOCK, each, each_part, each_parts, join_array, squares, squares_of, sum_of_squares,
    tree, tree_of_columns,
};
use crate::real::{Dtype, Real};
use crate::rule::{
    Area, Declaration, Form, MAX_COEFFICIENTS, Moment, Program, ProgramPass, Room, Slot, TensorRule, Unit, Work,
    coefficients, halves,
};

/// The rule.
#[derive(Debug)]
pub struct Adafactor;

/// Rows whose squares are added to one partial sum of the columns.
const BAND: usize = 64;

/// On a GPU: elements of a line that one lane adds up at least.
const PIECE: usize = 128;
/// Pieces of a line at most: software adapters end a shader's loops after 65,535 rounds together.
const MOST_PIECES: usize = 4096;
/// Words of a partial sum.
const PARTIAL: usize = 4;

/// The scalars of one update.
struct Scalars {
    eps1: f64,
    eps2: f64,
    /// wₜ.
    weight: f64,
    /// ρₜ.
    rho: f64,
    d: f64,
    /// `1 − lr·λ`.
    shrink: f64,
    /// The lower bound of V̂.
    smallest: f64,
}

impl Scalars {
    fn new(h: &Hypers, at: Moment, dtype: Dtype) -> Self {
        let (eps1, eps2) = match h.get("eps") {
            Some(Value::Pair([eps1, eps2])) => (eps1, eps2),
            Some(Value::HalfPair(eps2)) => (dtype.epsilon(), eps2),
            other => unreachable!("eps is declared as a pair, found {other:?}"),
        };
        let (t, lr) = (at.step as f64, h.float("lr"));
        Self {
            eps1,
            eps2,
            weight: libm::pow(t, h.float("beta2_decay")),
            rho: lr.min(1.0 / libm::sqrt(t)),
            d: h.float("d"),
            shrink: 1.0 - lr * h.float("weight_decay"),
            smallest: eps1 * eps1,
        }
    }
}

coefficients! {
    /// [`Scalars`] for the GPU; what enters double-floats is one.
    OnGpu {
        /// wₜ.
        weight,
        /// `1 − lr·λ`.
        shrink,
        /// ε₁².
        smallest,
        /// ε₁.
        eps1,
        /// ε₂, its upper half.
        eps2_hi,
        /// ε₂, its lower half.
        eps2_lo,
        /// ρₜ, its upper half.
        rho_hi,
        /// ρₜ, its lower half.
        rho_lo,
        /// d, its upper half.
        d_hi,
        /// d, its lower half.
        d_lo,
    }
}

fn on_gpu(h: &Hypers, at: Moment, _: &[usize], dtype: Dtype) -> [f64; MAX_COEFFICIENTS] {
    let Scalars { eps1, eps2, weight, rho, d, shrink, smallest } = Scalars::new(h, at, dtype);
    let ([eps2_hi, eps2_lo], [rho_hi, rho_lo], [d_hi, d_lo]) = (halves(eps2), halves(rho), halves(d));
    OnGpu { weight, shrink, smallest, eps1, eps2_hi, eps2_lo, rho_hi, rho_lo, d_hi, d_lo }.into_row()
}

/// How many rows and how many columns the matrices have together.
fn lines(form: &Form) -> [usize; 2] {
    [form.matrices * form.rows, form.matrices * form.columns]
}

/// How many pieces each row and each column has.
fn pieces(form: &Form) -> [usize; 2] {
    [form.columns, form.rows].map(|n| n.div_ceil(n.div_ceil(MOST_PIECES).max(PIECE)))
}

/// Lines that one lane does not finish: all rows, all columns, or none.
fn long_lines(form: &Form) -> [usize; 2] {
    let ([rows, columns], [of_row, of_column]) = (lines(form), pieces(form));
    [if of_row > 1 { rows } else { 0 }, if of_column > 1 { columns } else { 0 }]
}

/// Matrices whose rows' mean one lane does not finish.
fn long_stacks(form: &Form) -> usize {
    if form.rows > PIECE { form.matrices } else { 0 }
}

/// By chunk two partial sums; factor and padding; by matrix a floor; by piece a partial sum, of long lines only.
fn scratch(form: &Form) -> usize {
    let ([rows, columns], [of_row, of_column]) = (long_lines(form), pieces(form));
    let partials = 2 * form.chunks() + 1 + rows * of_row + columns * of_column + long_stacks(form) * of_column;
    PARTIAL * partials + form.matrices
}

/// The last two axes.
fn matrix(shape: &[usize]) -> Option<(usize, usize)> {
    match shape {
        [.., rows, columns] => Some((*rows, *columns)),
        _ => None,
    }
}

/// V̂ of a tensor and how it is bounded, by lines: the rows of all matrices, or blocks of a tensor without rows.
struct Estimate<'a, F> {
    row: &'a [F],
    column: &'a [F],
    variance: &'a [F],
    /// By matrix: max(mean(R), ε₁).
    floors: &'a [F],
    columns: usize,
    rows: usize,
    smallest: F,
}

impl<'a, F: Real> Estimate<'a, F> {
    /// What U of the elements of line i follows from, with the elements' columns or, where r and floor are 1, variances.
    #[inline(always)]
    fn line(&self, i: usize) -> (&'a [F], impl Fn(F, F) -> F + use<'a, F>) {
        let (values, r, floor) = if self.floors.is_empty() {
            (&self.variance[i * self.columns..], F::ONE, F::ONE)
        } else {
            let matrix = i / self.rows;
            (&self.column[matrix * self.columns..][..self.columns], self.row[i], self.floors[matrix])
        };
        let smallest = self.smallest;
        (values, move |g: F, c: F| {
            let v = (r * c) / floor;
            let v = if v < smallest { smallest } else { v };
            (F::ONE / v.sqrt()) * g
        })
    }

    /// How many lines a thread works on at once.
    fn lines_at_once(&self) -> usize {
        (STRETCH / self.columns).max(1)
    }
}

/// ΣU² of each line.
struct Squares<'a, F> {
    estimate: &'a Estimate<'a, F>,
    first: usize,
    g: &'a [F],
    sums: &'a mut [f64],
}

impl<F: Real> Loop for Squares<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let mut block = [F::ZERO; SQUARES_BLOCK];
        for (i, (g, sum)) in self.g.chunks(self.estimate.columns).zip(self.sums).enumerate() {
            let (values, u) = self.estimate.line(self.first + i);
            *sum = squares_of(g, values, &mut block, u);
        }
    }
}

/// The update of parameters, line by line.
struct Apply<'a, F> {
    estimate: &'a Estimate<'a, F>,
    first: usize,
    p: &'a mut [F],
    g: &'a [F],
    shrink: F,
    factor: F,
}

impl<F: Real> Loop for Apply<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run(self) {
        let columns = self.estimate.columns;
        for (i, (p, g)) in self.p.chunks_mut(columns).zip(self.g.chunks(columns)).enumerate() {
            let (values, u) = self.estimate.line(self.first + i);
            for ((p, &g), &c) in p.iter_mut().zip(g).zip(values) {
                *p = *p * self.shrink + self.factor * u(g, c);
            }
        }
    }
}

/// Sums of the squares of each row, and of each column of each matrix, of several matrices or of a part of one.
struct Sums<'a, F> {
    g: &'a [F],
    rows: usize,
    columns: usize,
    of_rows: &'a mut [f64],
    of_columns: &'a mut [f64],
}

impl<F: Real> Loop for Sums<'_, F> {
    type Out = ();

    #[inline(always)]
    fn run(self) -> Self::Out {
        let Self { g, rows, columns, of_rows, of_columns } = self;
        of_columns.fill(0.0);
        let mut of_rows = of_rows.iter_mut();
        for (matrix, sums) in g.chunks(rows * columns).zip(of_columns.chunks_exact_mut(columns)) {
            for (row, of_row) in matrix.chunks_exact(columns).zip(&mut of_rows) {
                *of_row = squares(row);
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += x.to_f64() * x.to_f64();
                }
            }
        }
    }
}

/// Elements of the sums of all rows, and of the columns of each matrix or of each band of it.
fn sums_of(shape: &[usize]) -> [usize; 2] {
    let Some((rows, columns)) = matrix(shape) else { return [0; 2] };
    let matrices = shape[..shape.len() - 2].iter().product::<usize>();
    [matrices * rows, matrices * rows.div_ceil(BAND) * columns]
}

/// Writes sums of the squares of all rows, and of the columns of each matrix or of each band of it.
fn sums<F: Real>(loops: Loops, g: &[F], [rows, columns]: [usize; 2], of_rows: &mut [f64], of_columns: &mut [f64]) {
    let run = |[of_rows, of_columns]: [&mut [f64]; 2], g: &[F]| {
        loops.isa.run(Sums { g, rows, columns, of_rows, of_columns });
    };
    let len = rows * columns;
    if rows > BAND {
        // Parts of large matrices.
        let bands = rows.div_ceil(BAND);
        each_parts(loops, [(of_rows, rows), (of_columns, bands * columns)], (g, len), |[of_rows, of_columns], g| {
            each_parts(loops, [(of_rows, BAND), (of_columns, columns)], (g, BAND * columns), run);
        });
    } else {
        // Small ones together.
        let several = (STRETCH / len).max(1);
        each_parts(loops, [(of_rows, several * rows), (of_columns, several * columns)], (g, several * len), run);
    }
}

impl TensorRule for Adafactor {
    const DECLARATION: Declaration = Declaration {
        stem: "adafactor",
        hypers: &[
            lr(1e-2),
            Hyper {
                name: "beta2_decay",
                default: Value::Float(-0.8),
                range: Range::AtMost(0.0),
                doc: "power c of the growing decay rate",
            },
            Hyper {
                name: "eps",
                default: Value::HalfPair(1e-3),
                range: Range::HalfPair(0.0),
                doc: "lower bounds ε₁ of the estimates and ε₂ of the parameter's size",
            },
            Hyper { name: "d", default: Value::Float(1.0), range: Range::AtLeast(1.0), doc: "clipping threshold d" },
            WEIGHT_DECAY,
            MAXIMIZE,
        ],
        slots: &[
            Slot { name: "row_var", doc: "row means R, with two axes or more" },
            Slot { name: "col_var", doc: "column means C, with two axes or more" },
            Slot { name: "variance", doc: "second moment, with fewer axes" },
        ],
        paper: "Shazeer, Stern 2018, Adafactor: adaptive learning rates with sublinear memory cost",
        ..Declaration::COMMON
    };

    fn accept(place: &str, label: &str, _: &[usize], dtype: Dtype) -> Result<()> {
        if dtype.is_complex() {
            return Err(Error::refuse(ErrorKind::Type, place, label, "of real numbers", dtype));
        }
        Ok(())
    }

    fn slot_shape(k: usize, shape: &[usize]) -> Option<Vec<usize>> {
        let last = shape.len().wrapping_sub(1);
        let mut slot = shape.to_vec();
        match (k, matrix(shape)) {
            (0, Some(_)) => slot[last] = 1,
            (1, Some(_)) => slot[last - 1] = 1,
            (2, None) => {}
            _ => return None,
        }
        Some(slot)
    }

    fn room(shape: &[usize]) -> Room {
        let [of_rows, of_columns] = sums_of(shape);
        match matrix(shape) {
            Some(_) => Room { elements: shape[..shape.len() - 2].iter().product(), sums: of_rows + of_columns },
            None => Room { elements: 0, sums: shape.iter().product::<usize>().div_ceil(SUM_BLOCK) },
        }
    }

    fn update<F: Real>(h: &Hypers, at: Moment, work: Work<'_, F>) {
        let Work { shape, dtype, p, g, slots: [row, column, variance, _], loops, elements: floors, sums: room } = work;
        let Scalars { eps1, eps2, weight, rho, d, shrink, smallest } = Scalars::new(h, at, dtype);
        let (n, weight) = (p.len() as f64, F::from_f64(weight));
        let size = libm::sqrt(sum_of_squares(loops, p) / n);
        // A size that is not a number makes the update so.
        let size = if size < eps2 { eps2 } else { size };
        let alpha = size * rho;

        let (rows, columns) = matrix(shape).unwrap_or((1, SUM_BLOCK));
        if matrix(shape).is_some() {
            let averaged = |averages: &mut [F], sums: &[f64], n: usize| {
                for (x, sum) in averages.iter_mut().zip(sums) {
                    *x = F::lerp(*x, F::from_f64(sum / n as f64), weight);
                }
            };
            let (of_rows, of_columns) = room.split_at_mut(sums_of(shape)[0]);
            sums(loops, g, [rows, columns], of_rows, of_columns);
            averaged(row, of_rows, columns);
            let bands = of_columns.chunks_exact_mut(rows.div_ceil(BAND) * columns);
            let averages = row.chunks_exact(rows).zip(column.chunks_exact_mut(columns));
            for (((row, column), bands), floor) in averages.zip(bands).zip(&mut *floors) {
                averaged(column, tree_of_columns(bands, columns), rows);
                let mean = join_array(row, 0.0, F::to_f64, |a, b| a + b) / rows as f64;
                *floor = F::from_f64(if mean < eps1 { eps1 } else { mean });
            }
        } else {
            each(loops, variance, [g], |v, [g]| F::lerp(v, g * g, weight));
        }
        let smallest = F::from_f64(smallest);
        let estimate = &Estimate { row, column, variance, floors, columns, rows, smallest };
        let (lines, stretch) = (estimate.lines_at_once(), estimate.lines_at_once() * columns);
        let part = |i: usize| &g[i * stretch..g.len().min((i + 1) * stretch)];
        // Those of the rows are used up, and as many.
        let sums = &mut room[..g.len().div_ceil(columns)];
        each_part(loops, sums, lines, |i, sums| {
            loops.isa.run(Squares { estimate, first: i * lines, g: part(i), sums });
        });
        let clipping = libm::sqrt(tree(sums) / n) / d;
        let factor = F::from_f64(-alpha / if clipping < 1.0 { 1.0 } else { clipping });
        let shrink = F::from_f64(shrink);
        each_part(loops, p, stretch, |i, p| {
            loops.isa.run(Apply { estimate, first: i * lines, p, g: part(i), shrink, factor });
        });
    }

    const PROGRAM: Program = {
        const CHUNKS: usize = Program::CHUNK_UNIT;
        const PIECES: usize = 1;
        const LONG_LINES: usize = 2;
        const STACKS: usize = 3;
        const LONG_STACKS: usize = 4;
        const TENSORS: usize = 5;
        const LINES: usize = 6;
        const fn pass(entry: &'static str, unit: usize) -> ProgramPass {
            ProgramPass { entry, unit, repeats: false }
        }
        const fn by_lane(count: fn(&Form) -> usize) -> Unit {
            Unit { count, by_lane: true }
        }
        Program {
            coefficients: OnGpu::NAMES,
            constants: &[("PIECE", PIECE as u32), ("MOST_PIECES", MOST_PIECES as u32)],
            units: &[
                Program::CHUNKS,
                by_lane(|form| lines(form).iter().zip(pieces(form)).map(|(lines, pieces)| lines * pieces).sum()),
                by_lane(|form| long_lines(form).iter().sum()),
                by_lane(|form| form.matrices * pieces(form)[1]),
                by_lane(long_stacks),
                Program::TENSORS,
                by_lane(|form| lines(form).iter().sum()),
            ],
            areas: &[Area { name: "scratch", words: scratch }],
            passes: &[
                pass("sizes", CHUNKS),
                pass("squares", PIECES),
                pass("means", LONG_LINES),
                pass("stacks", STACKS),
                pass("floors", LONG_STACKS),
                pass("estimates", CHUNKS),
                pass("factors", TENSORS),
                pass("update", CHUNKS),
                pass("flush", LINES),
            ],
            row: on_gpu,
            turns: |_| 0,
        }
    };
}
