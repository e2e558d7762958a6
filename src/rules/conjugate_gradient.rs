//! Conjugate gradients, as the registry knows them. The mathematics is in [`crate::closure::conjugate`].

use super::common::{JOINT, MAX_EVAL, MAX_ITER, TOLERANCE_CHANGE, TOLERANCE_GRAD, lr};
use crate::closure::ClosureRule;
use crate::closure::conjugate::{Cycle, Options};
use crate::closure::vector::Vector;
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::rule::{Declaration, Slot, Sparse};

/// The rule.
#[derive(Debug)]
pub struct ConjugateGradient;

impl ClosureRule for ConjugateGradient {
    const DECLARATION: Declaration = Declaration {
        stem: "conjugate_gradient",
        hypers: &[
            lr(1.0),
            MAX_ITER,
            MAX_EVAL,
            TOLERANCE_GRAD,
            TOLERANCE_CHANGE,
            Hyper {
                name: "restart",
                default: Value::None,
                range: Range::OrNone(&Range::Whole(1, i64::MAX)),
                doc: "iterations from one steepest descent to the next; None for the number of elements",
            },
        ],
        joint: &[
            JOINT[0],
            JOINT[1],
            JOINT[2],
            JOINT[3],
            JOINT[4],
            JOINT[5],
            Slot { name: "since_restart", doc: "iterations since the last steepest descent" },
        ],
        sparse: Sparse::Accepted,
        shows_step: false,
        paper: "Polak, Ribière 1969, Note sur la convergence de méthodes de directions conjuguées",
        ..Declaration::COMMON
    };

    type Options = Options;
    type Memory<V: Vector> = Cycle;

    fn options(h: &Hypers) -> Options {
        Options { restart: h.whole("restart").map(i64::unsigned_abs) }
    }
}
