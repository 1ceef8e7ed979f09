//! Guides of `docs/`, followed to the letter: their commands, in empty folders. Only folders that belong to somebody else
//! (`/run/user/1000`, `/var/tmp`, `/srv`) are put elsewhere, and what a test says.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::Scratch;

/// The sources.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the sources are there")
}

/// A guide, by its path in the sources.
#[derive(Clone, Copy)]
pub struct Guide(pub &'static str);

impl Guide {
    pub fn text(self) -> String {
        fs::read_to_string(root().join(self.0)).expect("the guide is there")
    }

    /// The code blocks of a section with their kinds, in order.
    #[track_caller]
    pub fn section(self, heading: &str) -> Vec<(String, String)> {
        let text = self.text();
        // A section ends where one begins that is not a part of it.
        let depth = |line: &str| line.starts_with('#').then(|| line.find(|c| c != '#')).flatten();
        let mut lines = text.lines().skip_while(|line| line.trim_start_matches('#') != format!(" {heading}"));
        let own = lines.next().and_then(depth).unwrap_or(0);
        let mut blocks = Vec::new();
        while let Some(line) = lines.next().filter(|line| depth(line).is_none_or(|depth| depth > own)) {
            if let Some(kind) = line.strip_prefix("```") {
                let code: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
                blocks.push((kind.to_string(), code.join("\n")));
            }
        }
        assert!(!blocks.is_empty(), "{} has no section '{heading}' with code", self.0);
        blocks
    }

    /// The shell commands of a section.
    #[track_caller]
    pub fn commands(self, heading: &str) -> Vec<String> {
        self.section(heading).into_iter().filter(|(kind, _)| kind == "sh").map(|(_, code)| code).collect()
    }
}

/// A user's terminal: `ringstone` is in the path, and its state is the server's.
pub struct Terminal<'a> {
    pub scratch: &'a Scratch,
    pub folder: PathBuf,
    /// What a script says, and what is meant here.
    pub instead: Vec<(String, String)>,
}

impl Terminal<'_> {
    pub fn new(scratch: &Scratch) -> Terminal<'_> {
        for name in ["bin", "xdg", "here"] {
            fs::create_dir(scratch.path().join(name)).expect("a new folder");
        }
        symlink(env!("CARGO_BIN_EXE_ringstone"), scratch.path().join("bin/ringstone")).expect("a link");
        symlink(scratch.state(), scratch.path().join("xdg/ringstone")).expect("a link");
        let elsewhere = scratch.path().display().to_string();
        let instead = ["/run/user/1000", "/var/tmp", "/srv"].map(|from| (from.to_string(), elsewhere.clone()));
        Terminal { scratch, folder: scratch.path().join("here"), instead: instead.into() }
    }

    pub fn shell(&self, script: &str) -> Command {
        let elsewhere = self.scratch.path().display().to_string();
        let script = self.instead.iter().fold(script.to_string(), |script, (from, to)| script.replace(from, to));
        let path = std::env::var("PATH").expect("there is a path");
        let mut command = Command::new("sh");
        command.arg("-ec").arg(script).current_dir(&self.folder).stdin(Stdio::null());
        command.env("PATH", format!("{elsewhere}/bin:{path}")).env("RS", root());
        command.env("XDG_STATE_HOME", self.scratch.path().join("xdg"));
        command
    }

    #[track_caller]
    pub fn run(&self, script: &str) -> Output {
        let output = self.shell(script).output().expect("there is a shell");
        let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{script}\n{said}{wrong}");
        output
    }

    /// The same with something that is refused: what it says.
    #[track_caller]
    pub fn refused(&self, script: &str) -> String {
        let output = self.shell(script).output().expect("there is a shell");
        assert!(!output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// A program that ends with the test.
pub struct Background(pub Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
