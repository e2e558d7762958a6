//! L-BFGS, as the registry knows it. The mathematics is in [`crate::closure::lbfgs`].

use super::common::{JOINT, MAX_EVAL, MAX_ITER, TOLERANCE_CHANGE, TOLERANCE_GRAD, lr};
use crate::closure::ClosureRule;
use crate::closure::lbfgs::{History, Options};
use crate::closure::vector::Vector;
use crate::hyper::{Choice, Hyper, Hypers, Range, Value};
use crate::rule::{Declaration, Slot, Sparse};

/// The rule.
#[derive(Debug)]
pub struct Lbfgs;

impl ClosureRule for Lbfgs {
    const DECLARATION: Declaration = Declaration {
        stem: "lbfgs",
        hypers: &[
            lr(1.0),
            MAX_ITER,
            MAX_EVAL,
            TOLERANCE_GRAD,
            TOLERANCE_CHANGE,
            Hyper {
                name: "history_size",
                default: Value::Int(100),
                range: Range::Whole(1, i64::MAX),
                doc: "pairs of differences to remember",
            },
            Hyper {
                name: "line_search_fn",
                default: Value::None,
                range: Range::OrNone(&Range::OneOf(&[Choice::StrongWolfe])),
                doc: "how steps are searched for; None takes lr as the step",
            },
        ],
        joint: &[
            JOINT[0],
            JOINT[1],
            JOINT[2],
            JOINT[3],
            JOINT[4],
            JOINT[5],
            Slot { name: "old_dirs", doc: "differences y of gradients, oldest first" },
            Slot { name: "old_stps", doc: "differences s of points" },
            Slot { name: "ro", doc: "1/(y·s) of each pair" },
            Slot { name: "H_diag", doc: "factor γ of the first inverse Hessian" },
            Slot { name: "al", doc: "factors α of the last recursion" },
        ],
        sparse: Sparse::Accepted,
        shows_step: false,
        paper: "Liu, Nocedal 1989, On the limited memory BFGS method for large scale optimization",
        ..Declaration::COMMON
    };

    type Options = Options;
    type Memory<V: Vector> = History<V>;

    fn options(h: &Hypers) -> Options {
        Options {
            history_size: h.whole("history_size").and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX),
            strong_wolfe: h.choice("line_search_fn") == Some(Choice::StrongWolfe),
        }
    }
}
