//! Lists of cores on the command line.

/// A list of cores, without repetitions and not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(Vec<usize>);

/// Reads a list as in 0,2-3.
///
/// # Errors
/// It is none, with an example of one.
pub fn parse(text: &str) -> Result<Cores, String> {
    let bad = |part: &str| format!("'{part}' is neither a core nor a range of cores; write for example 0,2-3");
    let mut cores = Vec::new();
    for part in text.trim_matches(['[', ']']).split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| bad(part))?;
        let last: usize = last.trim().parse().map_err(|_| bad(part))?;
        if first > last || last >= 1024 {
            return Err(bad(part));
        }
        cores.extend((first..=last).filter(|core| !cores.contains(core)).collect::<Vec<_>>());
    }
    Ok(Cores(cores))
}

/// The cores that this process may use.
pub fn allowed() -> Vec<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()
}

impl Cores {
    /// The cores, if this process may use them all.
    ///
    /// # Errors
    /// It may not; `option` is what they were given with.
    pub fn checked(&self, option: &str) -> Result<Vec<usize>, String> {
        let allowed = allowed();
        match self.0.iter().find(|core| !allowed.contains(core)) {
            Some(core) => Err(format!("{option}: core {core} is not one that this process may use ({allowed:?})")),
            None => Ok(self.0.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists() {
        assert_eq!(parse("0,2-4,3").unwrap().0, [0, 2, 3, 4]);
        assert_eq!(parse("[1]").unwrap().0, [1]);
        for bad in ["", "a", "3-1", "1,,2", "-1", "99999999"] {
            assert!(parse(bad).unwrap_err().contains("0,2-3"), "{bad}");
        }
    }

    #[test]
    fn cores_that_there_are_not() {
        let why = parse("1023").unwrap().checked("--core").unwrap_err();
        assert!(why.starts_with("--core: core 1023 is not one"), "{why}");
    }
}
