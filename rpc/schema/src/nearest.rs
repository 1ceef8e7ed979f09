//! "Did you mean": the known name nearest to a mistyped one.

/// Longer names are compared no further than this, so that a peer cannot make
/// a comparison expensive.
const LONGEST: usize = 64;

/// The candidate that a mistyped `name` most likely meant, if any is near.
///
/// Near means at most a third of its letters (rounded up) inserted, removed, changed or
/// swapped with a neighbour; letter case and `-` for `_` count as nothing. The
/// first of several equally near candidates is taken.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = folded(name)?;
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let Some(other) = folded(candidate) else {
            continue;
        };
        let limit = name.len().max(other.len()).div_ceil(3);
        if name.len().abs_diff(other.len()) > limit {
            continue;
        }
        let distance = distance(&name, &other);
        if distance <= limit && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

fn folded(name: &str) -> Option<Vec<char>> {
    let chars: Vec<char> = name
        .chars()
        .take(LONGEST + 1)
        .map(|c| match c.to_ascii_lowercase() {
            '-' => '_',
            c => c,
        })
        .collect();
    (!chars.is_empty() && chars.len() <= LONGEST).then_some(chars)
}

/// Optimal string alignment distance.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    let mut row = vec![0; b.len() + 1];
    for i in 1..=a.len() {
        row[0] = i;
        for j in 1..=b.len() {
            let change = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = change.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        std::mem::swap(&mut before, &mut last);
        std::mem::swap(&mut last, &mut row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let known = ["block_size", "num_blocks", "name", "uuid"];
        assert_eq!(nearest("blocksize", known), Some("block_size"));
        assert_eq!(nearest("block-size", known), Some("block_size"));
        assert_eq!(nearest("NAME", known), Some("name"));
        assert_eq!(nearest("nmae", known), Some("name"));
        assert_eq!(nearest("nonsense", known), None);
        assert_eq!(nearest("", known), None);
        assert_eq!(nearest(&"x".repeat(5_000_000), known), None);
    }

    #[test]
    fn distances() {
        let d = |a: &str, b: &str| distance(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
        assert_eq!(d("abc", "abc"), 0);
        assert_eq!(d("abc", "acb"), 1);
        assert_eq!(d("abc", ""), 3);
        assert_eq!(d("kitten", "sitting"), 3);
    }
}
