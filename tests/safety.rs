//! `docs/safety.md` lists every place with `unsafe`, with the reason that stands there in the code.
//!
//! `ROPTIM_WRITE_DOCS=1 cargo test --release --features gpu --test safety` writes the list anew.

#![allow(clippy::print_stderr, reason = "says what it wrote")]

#[path = "common/files.rs"]
mod files;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use files::files;

const BEGIN: &str = "<!-- list of unsafe, written by tests/safety.rs -->\n";
const END: &str = "<!-- end of list -->\n";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A place with the word, in code that is not a unit test's.
struct Place {
    within: String,
    kind: &'static str,
    reason: String,
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    Some(text.trim_start_matches(['/', '!']).trim())
}

/// The comment lines right above a line, and above the attributes there.
fn above<'t>(lines: &[&'t str], at: usize) -> Vec<&'t str> {
    let mut texts: Vec<&str> = Vec::new();
    for line in lines[..at].iter().rev() {
        match comment(line) {
            Some(text) => texts.push(text),
            None if texts.is_empty() && line.trim_start().starts_with("#[") => {}
            None => break,
        }
    }
    texts.reverse();
    texts
}

/// What a comment says after a mark, up to its end or an empty line.
fn after(texts: &[&str], mark: &str) -> Option<String> {
    let from = texts.iter().rposition(|text| text.starts_with(mark))?;
    let first = texts[from][mark.len()..].trim();
    let rest = texts[from + 1..].iter().take_while(|text| !text.is_empty()).copied();
    Some(std::iter::once(first).filter(|text| !text.is_empty()).chain(rest).collect::<Vec<_>>().join(" "))
}

fn places(path: &Path) -> Vec<Place> {
    let text = fs::read_to_string(root().join(path)).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    let mut within = String::from("the file");
    for (at, line) in lines.iter().enumerate() {
        if comment(line).is_some() {
            continue;
        }
        let named: Vec<&str> = words(line).collect();
        if let Some(f) = named.iter().position(|word| *word == "fn")
            && let Some(name) = named.get(f + 1)
            && line.contains(&format!("fn {name}"))
        {
            within = format!("`{name}`");
        }
        for _ in named.iter().filter(|word| **word == "unsafe") {
            let is_declared = line.contains("unsafe fn(");
            let kind = match () {
                () if is_declared => "type",
                () if line.contains("unsafe fn") => "function",
                () if line.contains("unsafe impl") => "impl",
                () => "block",
            };
            let mark = if matches!(kind, "function" | "type") { "# Safety" } else { "SAFETY:" };
            // A block within a statement has its comment above the statement, or above an arm of it.
            let reason = (at.saturating_sub(8)..=at).rev().find_map(|line| after(&above(&lines, line), mark));
            let reason = reason.unwrap_or_else(|| panic!("{}:{}: no reason is given", path.display(), at + 1));
            let within = match kind {
                "impl" => format!("`{}`", line.trim().trim_start_matches("unsafe ").trim_end_matches(" {}")),
                "type" => {
                    named.windows(2).find(|pair| pair[0] == "type").map_or(within.clone(), |p| format!("`{}`", p[1]))
                }
                _ => within.clone(),
            };
            found.push(Place { within, kind, reason });
        }
    }
    found
}

fn list() -> String {
    let mut page = String::new();
    let mut total = 0;
    for path in files("src").into_iter().chain(files("python/src")) {
        let places = places(&path);
        if places.is_empty() {
            continue;
        }
        total += places.len();
        let name = path.display().to_string();
        write!(
            page,
            "\n### {name}: {}\n\n| in | what | why it is sound, or what a caller owes |\n|---|---|---|\n",
            places.len()
        )
        .unwrap();
        for Place { within, kind, reason } in places {
            writeln!(page, "| {within} | {kind} | {} |", reason.replace('|', "\\|")).unwrap();
        }
    }
    format!("\n{total} places in all.\n{page}\n")
}

#[test]
fn every_place_is_in_the_list() {
    let path = root().join("docs/safety.md");
    let page = fs::read_to_string(&path).unwrap();
    let (head, rest) = page.split_once(BEGIN).unwrap();
    let (listed, tail) = rest.split_once(END).unwrap();
    let list = list();
    if std::env::var("ROPTIM_WRITE_DOCS").as_deref() == Ok("1") {
        fs::write(&path, [head, BEGIN, &list, END, tail].concat()).unwrap();
        eprintln!("written: {}", path.display());
        return;
    }
    for (number, (want, got)) in list.lines().zip(listed.lines()).enumerate() {
        assert_eq!(want, got, "line {number} of the list in docs/safety.md; write it with ROPTIM_WRITE_DOCS=1");
    }
    assert_eq!(list, listed, "docs/safety.md lists every place; write it with ROPTIM_WRITE_DOCS=1");
}
