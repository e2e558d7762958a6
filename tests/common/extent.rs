//! How much a run of the tests does.
#![allow(dead_code, reason = "each test binary uses its own part")]

/// Whether to do the long forms.
pub(crate) fn is_full() -> bool {
    is_set("ROPTIM_FULL_TESTS")
}

/// Whether to do less: where valgrind watches each access, without optimization, or for hundreds of mutants.
pub(crate) fn is_brief() -> bool {
    is_set("ROPTIM_BRIEF_TESTS")
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}
