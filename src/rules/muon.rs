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
//! The momentum is an average, as torch runs it. Deviation: the iteration runs in the compute type of the
//! parameter; torch's runs in bfloat16.

use super::common::{WEIGHT_DECAY, lr};
use crate::error::{Error, ErrorKind, Result, shape_text};
use crate::hyper::{Choice, Hyper, Hypers, Range, Value};
use crate::linear::{Matrix, product, sum_of_squares};
use crate::real::{Dtype, Real};
use crate::rule::{Declaration, Moment, Slot, TensorRule, Work};

/// The rule.
#[derive(Debug)]
pub struct Muon;

/// The iteration's result for the matrix `u` with no more rows than columns, in place.
fn orthogonalize<F: Real>(parallel: bool, u: &mut Vec<F>, rows: usize, columns: usize, [a, b, c]: [F; 3], steps: i64) {
    let mut gram = vec![F::ZERO; rows * rows];
    let mut polynomial = gram.clone();
    let mut next = u.clone();
    for _ in 0..steps {
        let x = Matrix::new(u, rows, columns);
        product(parallel, F::ONE, x, x.transposed(), F::ZERO, &mut gram);
        polynomial.copy_from_slice(&gram);
        let square = Matrix::new(&gram, rows, rows);
        product(parallel, c, square, square, b, &mut polynomial);
        next.copy_from_slice(u);
        product(parallel, F::ONE, Matrix::new(&polynomial, rows, rows), x, a, &mut next);
        std::mem::swap(u, &mut next);
    }
}

fn transposed<F: Real>(x: &[F], rows: usize, columns: usize) -> Vec<F> {
    (0..rows * columns).map(|i| x[(i % rows) * columns + i / rows]).collect()
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

    fn update<F: Real>(h: &Hypers, _: Moment, work: Work<'_, F>) {
        let Work { shape, p, g, slots: [buffer, ..], parallel, .. } = work;
        let &[rows, columns] = shape else { unreachable!("accept refused other shapes") };
        let (lr, momentum, eps) = (h.float("lr"), h.float("momentum"), h.float("eps"));
        let Some(Value::Triple(coefficients)) = h.get("ns_coefficients") else { unreachable!("declared as three") };
        let (weight, ahead) = (F::from_f64(1.0 - momentum), F::from_f64(momentum));
        for (b, &g) in buffer.iter_mut().zip(g) {
            *b = F::lerp(*b, g, weight);
        }
        let nesterov = h.flag("nesterov");
        let mut u: Vec<F> =
            buffer.iter().zip(g).map(|(&b, &g)| if nesterov { F::lerp(g, b, ahead) } else { b }).collect();
        let norm = libm::sqrt(sum_of_squares(parallel, &u));
        let norm = F::from_f64(if norm < eps { eps } else { norm });
        u.iter_mut().for_each(|x| *x = *x / norm);
        let tall = rows > columns;
        if tall {
            u = transposed(&u, rows, columns);
        }
        let steps = h.whole("ns_steps").unwrap_or(0);
        orthogonalize(parallel, &mut u, rows.min(columns), rows.max(columns), coefficients.map(F::from_f64), steps);
        if tall {
            u = transposed(&u, columns, rows);
        }
        let (rows, columns) = (rows as f64, columns as f64);
        let adjusted = match h.choice("adjust_lr_fn") {
            Some(Choice::MatchRmsAdamw) => lr * (0.2 * libm::sqrt(rows.max(columns))),
            _ => lr * libm::sqrt((rows / columns).max(1.0)),
        };
        let (shrink, factor) = (F::from_f64(1.0 - lr * h.float("weight_decay")), F::from_f64(-adjusted));
        for (p, &x) in p.iter_mut().zip(&u) {
            *p = *p * shrink + factor * x;
        }
    }
}
