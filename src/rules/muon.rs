//! Muon: momentum whose direction is made nearly orthogonal by a Newton–Schulz iteration. Matrices only.
//!
//! Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: *Muon: an optimizer for hidden layers in neural
//! networks*, 2024; `match_rms_adamw` is Liu et al.: *Muon is scalable for LLM training*, 2025:
//!
//! ```text
//! Bₜ = Bₜ₋₁ + (1 − μ)·(Gₜ − Bₜ₋₁)
//! X = Uₜ/max(‖Uₜ‖, ε),   Uₜ = Gₜ + μ·(Bₜ − Gₜ)  (nesterov)  or  Bₜ
//! X ← a·X + (b·A + c·A²)·X,   A = X·Xᵀ                        ns_steps times
//! θₜ = (1 − lr·λ)·θₜ₋₁ − lr·s·X
//! s = √max(1, rows/columns),   match_rms_adamw: 0.2·√max(rows, columns)
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | μ | `momentum` |
//! | a, b, c | `ns_coefficients` |
//! | ε | `eps` |
//! | λ | `weight_decay` |
//! | B | state `momentum_buffer` |
//!
//! The momentum is an average, as torch runs it. Of X·Xᵀ and Xᵀ·X the smaller is iterated: where there are no more
//! columns than rows, `A = Xᵀ·X` and `X ← a·X + X·(b·A + c·A²)`. Deviation: the iteration runs in the compute type of
//! the parameter; torch's runs in bfloat16.

use super::common::{WEIGHT_DECAY, lr};
use crate::error::{Error, ErrorKind, Result, shape_text};
use crate::hyper::{Choice, Hyper, Hypers, Range, Value};
use crate::isa::Loops;
use crate::linear::{Matrix, Product, each, sum_of_squares, transpose};
use crate::real::{Dtype, Real};
use crate::rule::{
    Area, Declaration, Form, Moment, Program, ProgramPass, Room, Slot, TensorRule, Unit, Work, coefficients,
};

/// The rule.
#[derive(Debug)]
pub struct Muon;

/// On a GPU: rows and columns of the part of a product that one workgroup computes.
const TILE: usize = 64;
/// On a GPU: terms that one workgroup adds up at least for an element of A.
const PART: usize = 4096;

coefficients! {
    /// The scalars of one update.
    Scalars {
        /// `1 − μ`.
        weight,
        /// μ.
        ahead,
        /// 1 with Nesterov momentum, else 0.
        nesterov,
        /// a.
        a,
        /// b.
        b,
        /// c.
        c,
        /// ε.
        eps,
        /// How often the iteration runs.
        steps,
        /// `1 − lr·λ`.
        shrink,
        /// `−lr·s`.
        factor,
    }
}

impl Scalars<f64> {
    fn new(h: &Hypers, shape: &[usize]) -> Self {
        let &[rows, columns] = shape else { unreachable!("accept refused other shapes") };
        let Some(Value::Triple([a, b, c])) = h.get("ns_coefficients") else { unreachable!("declared as three") };
        let (lr, momentum, rows, columns) = (h.float("lr"), h.float("momentum"), rows as f64, columns as f64);
        let adjusted = match h.choice("adjust_lr_fn") {
            Some(Choice::MatchRmsAdamw) => lr * (0.2 * libm::sqrt(rows.max(columns))),
            _ => lr * libm::sqrt((rows / columns).max(1.0)),
        };
        Self {
            weight: 1.0 - momentum,
            ahead: momentum,
            nesterov: f64::from(u8::from(h.flag("nesterov"))),
            a,
            b,
            c,
            eps: h.float("eps"),
            steps: f64::from(turns(h)),
            shrink: 1.0 - lr * h.float("weight_decay"),
            factor: -adjusted,
        }
    }
}

/// How often the iteration runs.
fn turns(h: &Hypers) -> u32 {
    h.whole("ns_steps").and_then(|steps| u32::try_from(steps).ok()).unwrap_or(0)
}

/// Rows and columns of a matrix that is not taller than wide.
fn wide(form: &Form) -> [usize; 2] {
    [form.rows.min(form.columns), form.rows.max(form.columns)]
}

/// In how many parts the sums of A are added up. Together they are no longer than X.
fn parts(form: &Form) -> usize {
    let [rows, columns] = wide(form);
    columns.div_ceil(PART.max(2 * rows))
}

/// Elements of A that are added up from several parts.
fn parted(form: &Form) -> usize {
    if parts(form) > 1 { wide(form)[0].pow(2) } else { 0 }
}

/// The iteration's result for the matrix `x` with no more columns than rows. `Xᵀ·X` reads both in order, `X·Xᵀ` neither:
/// that is worth transposing a wide matrix before and after.
/// Both arrays are written; the first one that is returned has the result.
fn orthogonalize<'a, F: Real>(
    loops: Loops,
    [mut x, mut next]: [&'a mut [F]; 2],
    squares: &mut [F],
    columns: usize,
    [a, b, c]: [F; 3],
    steps: u32,
) -> [&'a mut [F]; 2] {
    let (gram, rest) = squares.split_at_mut(columns * columns);
    let (polynomial, below) = rest.split_at_mut(columns * columns);
    for _ in 0..steps {
        let tall = Matrix::new(x, x.len() / columns, columns);
        Product { alpha: F::ONE, a: tall.transposed(), b: tall, plus: None }.write_symmetric(loops, below, gram);
        let square = Matrix::new(gram, columns, columns);
        Product { alpha: c, a: square, b: square, plus: Some((b, gram)) }.write_symmetric(loops, below, polynomial);
        let by = Matrix::new(polynomial, columns, columns);
        Product { alpha: F::ONE, a: tall, b: by, plus: Some((a, x)) }.write(loops, next);
        std::mem::swap(&mut x, &mut next);
    }
    [x, next]
}

impl TensorRule for Muon {
    const DECLARATION: Declaration = Declaration {
        stem: "muon",
        hypers: &[
            lr(1e-3),
            Hyper { default: Value::Float(0.1), ..WEIGHT_DECAY },
            Hyper { name: "momentum", default: Value::Float(0.95), range: Range::AtLeast(0.0), doc: "momentum μ" },
            Hyper { name: "nesterov", default: Value::Bool(true), range: Range::Flag, doc: "Nesterov momentum" },
            Hyper {
                name: "ns_coefficients",
                default: Value::Triple([3.4445, -4.7750, 2.0315]),
                range: Range::Triple,
                doc: "coefficients a, b, c of the iteration",
            },
            Hyper {
                name: "eps",
                default: Value::Float(1e-7),
                range: Range::AtLeast(0.0),
                doc: "lower bound ε of the norm that the matrix is divided by",
            },
            Hyper {
                name: "ns_steps",
                default: Value::Int(5),
                range: Range::Whole(0, 99),
                doc: "how often the iteration runs",
            },
            Hyper {
                name: "adjust_lr_fn",
                default: Value::None,
                range: Range::OrNone(&Range::OneOf(&[Choice::Original, Choice::MatchRmsAdamw])),
                doc: "factor s on the learning rate; None is the original one",
            },
        ],
        slots: &[Slot { name: "momentum_buffer", doc: "average B of gradients" }],
        shows_step: false,
        paper: "Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein 2024, Muon: an optimizer for hidden layers in neural networks",
        ..Declaration::COMMON
    };

    fn accept(place: &str, label: &str, shape: &[usize], dtype: Dtype) -> Result<()> {
        if dtype.is_complex() {
            return Err(Error::refuse(ErrorKind::Type, place, label, "of real numbers", dtype));
        }
        if shape.len() != 2 {
            let got = format!("{} in shape {}", shape.len(), shape_text(shape));
            return Err(Error::refuse(ErrorKind::Value, place, label, "of two axes", got)
                .with_remedy("give vectors, convolution kernels and embeddings to AdamW beside it"));
        }
        Ok(())
    }

    fn slot_shape(k: usize, shape: &[usize]) -> Option<Vec<usize>> {
        (k == 0).then(|| shape.to_vec())
    }

    fn room(shape: &[usize]) -> Room {
        let shorter = shape.iter().min().map_or(0, |n| n * n);
        // X and its next value; A, its polynomial, and their lower halves.
        Room { elements: 2 * shape.iter().product::<usize>() + 3 * shorter, sums: 0 }
    }

    fn update<F: Real>(h: &Hypers, _: Moment, work: Work<'_, F>) {
        let Work { shape, p, g, slots: [buffer, ..], loops, elements, .. } = work;
        let &[rows, columns] = shape else { unreachable!("accept refused other shapes") };
        let Scalars { weight, ahead, nesterov, a, b, c, eps, shrink, factor, .. } = Scalars::new(h, shape);
        let (weight, ahead, is_nesterov) = (F::from_f64(weight), F::from_f64(ahead), nesterov != 0.0);
        each(loops, buffer, [g], |b, [g]| F::lerp(b, g, weight));
        let (u, rest) = elements.split_at_mut(g.len());
        let (other, squares) = rest.split_at_mut(g.len());
        each(loops, u, [g, buffer], |_, [g, b]| if is_nesterov { F::lerp(g, b, ahead) } else { b });
        let norm = libm::sqrt(sum_of_squares(loops, u));
        let norm = F::from_f64(if norm < eps { eps } else { norm });
        each(loops, u, [], |u, []| u / norm);
        let coefficients = [a, b, c].map(F::from_f64);
        let x = if rows < columns {
            transpose(loops, u, columns, other);
            let [x, other] = orthogonalize(loops, [other, u], squares, rows, coefficients, turns(h));
            transpose(loops, x, rows, other);
            other
        } else {
            let [x, _] = orthogonalize(loops, [u, other], squares, columns, coefficients, turns(h));
            x
        };
        let (shrink, factor) = (F::from_f64(shrink), F::from_f64(factor));
        each(loops, p, [x], |p, [x]| p * shrink + factor * x);
    }

    const PROGRAM: Program = {
        const CHUNKS: usize = Program::CHUNK_UNIT;
        const TENSORS: usize = 1;
        const SQUARE_TILES: usize = 2;
        const TILES: usize = 3;
        const PARTS: usize = 4;
        const PARTED: usize = 5;
        const fn once(entry: &'static str, unit: usize) -> ProgramPass {
            ProgramPass { entry, unit, repeats: false }
        }
        const fn in_turns(entry: &'static str, unit: usize) -> ProgramPass {
            ProgramPass { entry, unit, repeats: true }
        }
        Program {
            coefficients: Scalars::NAMES,
            constants: &[("TILE", TILE as u32), ("PART", PART as u32)],
            units: &[
                Program::CHUNKS,
                Program::TENSORS,
                Unit { count: |form| wide(form)[0].div_ceil(TILE).pow(2), by_lane: false },
                Unit { count: |form| wide(form).iter().map(|n| n.div_ceil(TILE)).product(), by_lane: false },
                Unit { count: |form| wide(form)[0].div_ceil(TILE).pow(2) * parts(form), by_lane: false },
                Unit { count: parted, by_lane: true },
            ],
            // Before the iteration partial sums and the norm lie where the parts of A and its polynomial will.
            areas: &[
                Area { name: "even", words: |form| form.len },
                Area { name: "odd", words: |form| form.len },
                Area { name: "square", words: |form| (wide(form)[0].pow(2) * parts(form)).max(4 * form.chunks() + 4) },
            ],
            passes: &[
                once("momentum", CHUNKS),
                once("norms", TENSORS),
                once("normalize", CHUNKS),
                in_turns("gram", PARTS),
                in_turns("gather", PARTED),
                in_turns("polynomial", SQUARE_TILES),
                in_turns("next", TILES),
                once("update", CHUNKS),
            ],
            row: |h, _, shape, _| Scalars::new(h, shape).into_row(),
            turns,
        }
    };
}
