//! How loops run: with which instruction set, chosen once, and whether spread over threads. All ways give the same bits.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::arch::asm;
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

/// The processor's word that says how it rounds and whether it flushes subnormal numbers.
type Control = u64;

/// Rounding to nearest, nothing flushed, no trap: what a thread begins with, and what Rust's arithmetic means.
const STANDARD: Control = if cfg!(target_arch = "x86_64") { 0x1f80 } else { 0 };
/// Bits that report what happened in place of saying what should.
const REPORTS: Control = if cfg!(target_arch = "x86_64") { 0x3f } else { 0 };

/// The calling thread's control word, which becomes `new` if that is given.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn control(new: Option<Control>) -> Control {
    let mut now: Control = 0;
    // SAFETY: the word is read into `now`. It is only ever set to the standard one or, when that is over, to what the
    // thread's owner had put there.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("stmxcsr [{}]", in(reg) &raw mut now, options(nostack, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        asm!("mrs {}, fpcr", out(reg) now, options(nostack, preserves_flags));
        if let Some(new) = new {
            #[cfg(target_arch = "x86_64")]
            asm!("ldmxcsr [{}]", in(reg) &raw const new, options(nostack, preserves_flags));
            #[cfg(target_arch = "aarch64")]
            asm!("msr fpcr, {}", in(reg) new, options(nostack, preserves_flags));
        }
    }
    now
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn control(_: Option<Control>) -> Control {
    STANDARD
}

/// Standard arithmetic in the calling thread until it is dropped.
///
/// Some libraries, built with `-ffast-math`, make the thread that loads them flush subnormal numbers. The bits of a step
/// must not depend on what else a program has loaded.
#[derive(Debug)]
pub struct StandardFloats(Option<Control>);

impl StandardFloats {
    /// From now on.
    pub fn begin() -> Self {
        let found = control(None);
        let differs = found & !REPORTS != STANDARD;
        Self(differs.then(|| control(Some(STANDARD))))
    }

    /// From now on, for good.
    pub(crate) fn keep() {
        std::mem::forget(Self::begin());
    }
}

impl Drop for StandardFloats {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            control(Some(before));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn a_thread_that_flushes_computes_as_others_and_gets_its_setting_back() {
        let flushing = if cfg!(target_arch = "x86_64") { STANDARD | 0x8040 } else { 1 << 24 };
        let half_of_the_smallest = || black_box(black_box(f32::MIN_POSITIVE) * black_box(0.5));
        let work = move || {
            control(Some(flushing));
            let outcomes = [half_of_the_smallest(), {
                let _outer = StandardFloats::begin();
                let _inner = StandardFloats::begin();
                half_of_the_smallest()
            }];
            (outcomes, half_of_the_smallest(), control(None) & !REPORTS == flushing)
        };
        let (outcomes, after, is_kept) = std::thread::spawn(work).join().unwrap();
        assert_eq!(outcomes, [0.0, f32::MIN_POSITIVE / 2.0]);
        assert!(after == 0.0 && is_kept);
        assert!(half_of_the_smallest() > 0.0);
    }
}
