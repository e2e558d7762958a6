//! How loops run: with which instruction set, chosen once, and whether spread over threads. All ways give the same bits.

use std::sync::OnceLock;

/// A loop that is compiled once for each instruction set. `run` must be `#[inline(always)]`, like all that it calls in
/// the loop.
pub(crate) trait Loop {
    /// What it returns.
    type Out;
    /// The loop.
    fn run(self) -> Self::Out;
}

macro_rules! level {
    ($name:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $name<L: Loop>(work: L) -> L::Out {
            work.run()
        }
    };
}

level!(avx2, "avx2");
level!(avx512, "avx512f,avx512vl");

/// An instruction set level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the target always has: SSE2 on x86-64, NEON on arm64.
    Baseline,
    /// 256-bit vectors.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Isa {
    /// Every level, weakest first.
    pub const ALL: [Self; 3] = [Self::Baseline, Self::Avx2, Self::Avx512];

    /// The best one of this machine, or the weaker one that `ROPTIM_ISA` names
    /// (`baseline`, `avx2`, `avx512`).
    pub fn detect() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let asked = match std::env::var("ROPTIM_ISA").as_deref() {
                Ok("baseline") => Self::Baseline,
                Ok("avx2") => Self::Avx2,
                _ => Self::Avx512,
            };
            Self::of_machine().min(asked)
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn of_machine() -> Self {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            Self::Avx512
        } else if is_x86_feature_detected!("avx2") {
            Self::Avx2
        } else {
            Self::Baseline
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_machine() -> Self {
        Self::Baseline
    }

    /// Runs the loop compiled for this level, or for what the machine has if that is less.
    #[inline]
    pub(crate) fn run<L: Loop>(self, work: L) -> L::Out {
        match self.min(Self::detect()) {
            // SAFETY: `detect` found these features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(work) },
            _ => work.run(),
        }
    }

    /// The name that `ROPTIM_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

/// How the loops over a tensor run.
#[derive(Debug, Clone, Copy)]
pub struct Loops {
    /// The instruction set.
    pub isa: Isa,
    /// Whether they may be spread over the current thread pool.
    pub parallel: bool,
}
