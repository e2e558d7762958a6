//! Where a value is in its tree: as messages show it, and as the container names its tensors.

use std::fmt::{self, Write as _};

use super::tree::Key;

/// A way from the root, on the stack of whoever walks the tree.
#[derive(Debug, Clone, Copy)]
pub(super) enum Path<'a> {
    Root,
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, i64),
}

impl<'a> Path<'a> {
    pub(super) fn key(&'a self, key: &'a Key) -> Self {
        match key {
            Key::Str(key) => Self::Key(self, key),
            Key::Int(key) => Self::Index(self, *key),
        }
    }

    pub(super) fn item(&'a self, index: usize) -> Self {
        // A list longer than i64::MAX cannot exist.
        Self::Index(self, index as i64)
    }

    /// The name of the tensor at this place: keys as they are, joined by `:`, integers in brackets.
    ///
    /// Different places have different names: what separates, what escapes, and what names must not
    /// hold is written as `%XX` inside a key, an empty key as `%`.
    pub(super) fn tensor_name(&self) -> String {
        let mut name = String::new();
        self.push_name(&mut name);
        match name.as_str() {
            // Not a key of the tree: a tree of one tensor has no other name to clash with.
            "" => "tensor".into(),
            // Reserved by the container, and by file systems a tool may unpack to.
            "__metadata__" | "." | ".." => {
                let rest = name.split_off(1);
                let mut name = escaped(&name, |_| true);
                name.push_str(&rest);
                name
            }
            _ => name,
        }
    }

    fn push_name(&self, name: &mut String) {
        match self {
            Self::Root => {}
            Self::Key(parent, key) => {
                parent.push_name(name);
                if !matches!(parent, Self::Root) {
                    name.push(':');
                }
                if key.is_empty() {
                    name.push('%');
                }
                name.push_str(&escaped(key, |c| c.is_control() || "/\\:[]%".contains(c)));
            }
            Self::Index(parent, index) => {
                parent.push_name(name);
                name.push_str(&format!("[{index}]"));
            }
        }
    }
}

fn escaped(text: &str, escape: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if escape(c) {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                out.push_str(&format!("%{byte:02X}"));
            }
        } else {
            out.push(c);
        }
    }
    out
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("tree"),
            Self::Key(Self::Root, key) => write_key(f, key),
            Self::Key(parent, key) => {
                write!(f, "{parent}.")?;
                write_key(f, key)
            }
            Self::Index(Self::Root, index) => write!(f, "[{index}]"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// A key in a message: long ones cut, control characters escaped.
fn write_key(f: &mut fmt::Formatter<'_>, key: &str) -> fmt::Result {
    const SHOWN: usize = 60;
    for c in key.chars().take(SHOWN) {
        if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
    }
    if key.chars().nth(SHOWN).is_some() { f.write_char('…') } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_distinct() {
        let root = Path::Root;
        let key = |k| Path::Key(&root, k).tensor_name();
        assert_eq!(root.tensor_name(), "tensor");
        assert_eq!(key("layer1.weight"), "layer1.weight");
        assert_eq!(key(""), "%");
        assert_eq!(key("%"), "%25");
        assert_eq!(key("a/b:c[0]\n"), "a%2Fb%3Ac%5B0%5D%0A");
        assert_eq!(key("__metadata__"), "%5F_metadata__");
        assert_eq!(key(".."), "%2E.");
        assert_eq!(key("\u{85}é"), "%C2%85é");
        let state = Path::Key(&root, "state");
        let zero = Path::Index(&state, 0);
        assert_eq!(Path::Key(&zero, "exp_avg").tensor_name(), "state[0]:exp_avg");
        assert_eq!(Path::Key(&state, "0").tensor_name(), "state:0");
    }

    #[test]
    fn places_are_shown_as_python_would() {
        let root = Path::Root;
        let state = Path::Key(&root, "state");
        let zero = Path::Index(&state, 0);
        assert_eq!(Path::Key(&zero, "exp_avg").to_string(), "state[0].exp_avg");
        assert_eq!(Path::Key(&zero, "a\nb").to_string(), "state[0].a\\nb");
        assert_eq!(Path::Index(&root, 3).to_string(), "[3]");
        assert_eq!(root.to_string(), "tree");
        assert_eq!(Path::Key(&root, &"k".repeat(100)).to_string().chars().count(), 61);
    }
}
