//! Who may use whom, and where `unsafe` may stand.

#[path = "common/files.rs"]
mod files;

use std::fs;
use std::path::Path;

use files::files;

/// Each module of the engine and the modules it may use. ARCHITECTURE.md says the same.
const USES: &[(&str, &[&str])] = &[
    ("drill", &[]),
    ("error", &[]),
    ("hyper", &["error"]),
    ("isa", &[]),
    ("real", &[]),
    ("room", &["error"]),
    ("rule", &["error", "hyper", "isa", "real"]),
    ("linear", &["drill", "isa", "real"]),
    ("rules", &["closure", "error", "hyper", "isa", "linear", "real", "rule"]),
    ("tensor", &["error", "real", "room"]),
    ("store", &["error", "hyper", "real", "room", "rule", "tensor"]),
    ("cpu", &["drill", "error", "hyper", "isa", "linear", "real", "room", "rule", "rules", "tensor"]),
    ("shader", &["real", "rule", "rules"]),
    ("gpu", &["closure", "cpu", "drill", "error", "linear", "real", "rule", "rules", "shader", "store", "tensor"]),
    ("closure", &["error", "hyper", "isa", "linear", "real", "room", "rule"]),
    ("schedule", &["error"]),
    ("checkpoint", &["error", "hyper", "real", "room", "store"]),
    (
        "optimizer",
        &["closure", "cpu", "drill", "error", "gpu", "hyper", "real", "room", "rule", "rules", "store", "tensor"],
    ),
];

/// Files that may hold `unsafe`, and why.
const UNSAFE: &[(&str, &str)] = &[
    ("src/tensor.rs", "addresses of arrays, slot buffers"),
    ("src/linear.rs", "hands matrices to the matrix-product crate"),
    ("src/optimizer/mod.rs", "hands checked tensors to the executor"),
    ("src/cpu/measure.rs", "blocks of a job, and of arrays lent for a call"),
    ("src/cpu/memory.rs", "the CPU's access to arrays"),
    ("src/cpu/run.rs", "instruction-set dispatch of kernels"),
    ("src/cpu/mod.rs", "jobs handed to the threads"),
    ("src/isa.rs", "instruction-set dispatch, the control word of arithmetic"),
    ("src/cpu/pool.rs", "lends a call to other threads while it lasts"),
    ("src/cpu/whole.rs", "tensors handed to a tensor rule"),
    ("src/cpu/reduce.rs", "sums over arrays"),
    ("src/gpu/staging.rs", "arrays to and from staging memory"),
    ("src/gpu/array.rs", "checked arrays to and from the device"),
    ("src/gpu/executor.rs", "jobs with checked tensors"),
    ("src/gpu/vector.rs", "slices of the host to staging memory"),
    ("python/src/arrays.rs", "headers and views of NumPy arrays"),
    ("python/src/engine.rs", "checked arrays become tensors"),
    ("python/src/device_array.rs", "checked arrays become tensors"),
    ("python/src/shared.rs", "a checked array becomes a tensor"),
    ("python/src/clip.rs", "checked arrays become tensors"),
];

/// Lines with the word `unsafe` in all of them together.
const MOST_UNSAFE_LINES: usize = 103;

fn code_lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    // Unit tests stand at the end of a file; other items behind `cfg(test)` count as code.
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    code.lines().filter(|l| !l.trim_start().starts_with("//")).map(str::to_owned).collect()
}

#[test]
fn modules_use_only_what_they_may() {
    for path in files("src") {
        let parts: Vec<_> = path.iter().map(|p| p.to_str().unwrap().trim_end_matches(".rs")).collect();
        let module = parts[1];
        if module == "lib" {
            continue;
        }
        let (_, allowed) = USES.iter().find(|(name, _)| *name == module).unwrap_or_else(|| {
            panic!("{}: module {module} must have a line in USES", path.display());
        });
        for used in code_lines(&path).join("\n").split("crate::").skip(1).flat_map(first_names) {
            let is_module = USES.iter().any(|(name, _)| *name == used);
            let fine = used == module || !is_module || allowed.contains(&used.as_str());
            assert!(fine, "{}: {module} must not use {used}", path.display());
        }
    }
}

/// The modules named right behind `crate::`, one or several in braces.
fn first_names(after: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    match after.strip_prefix('{') {
        None => vec![word(after)],
        Some(list) => {
            let mut depth = 1;
            let inner: String = list
                .chars()
                .take_while(|c| {
                    depth += i32::from(*c == '{') - i32::from(*c == '}');
                    depth > 0
                })
                .collect();
            inner.split(',').map(|item| word(item.trim())).collect()
        }
    }
}

#[test]
fn unsafe_stands_only_in_the_named_files() {
    let mut lines = 0;
    for path in files("src").into_iter().chain(files("python/src")) {
        let count = code_lines(&path)
            .iter()
            .filter(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe"))
            .count();
        let named = UNSAFE.iter().any(|(file, _)| Path::new(file) == path);
        assert!(count == 0 || named, "{} must not hold unsafe", path.display());
        assert!(count > 0 || !named, "{} is named and holds no unsafe", path.display());
        lines += count;
    }
    assert!(lines <= MOST_UNSAFE_LINES, "{lines} lines with unsafe, at most {MOST_UNSAFE_LINES} are allowed");
}

#[test]
fn executors_know_no_rule() {
    for path in files("src/cpu").into_iter().chain(files("src/gpu")) {
        for line in code_lines(&path) {
            for preset in roptim::REGISTRY {
                let kinds = ["Elementwise(", "Tensor(", "Closure("];
                let rule =
                    kinds.iter().fold(format!("{:?}", preset.method), |rule, kind| rule.replace(kind, "RuleId::"));
                let (module, variant) = (format!("rules::{}", preset.declaration().stem), rule.replace(')', ""));
                assert!(!line.contains(&module) && !line.contains(&variant), "{}: {line}", path.display());
            }
        }
    }
}
