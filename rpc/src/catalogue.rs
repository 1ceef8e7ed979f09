//! All methods as text: the command line's list, one method's help, the
//! reference page.

use std::fmt::Write;

use schema::{Kind, Method, MethodSpec, Param, States};

use crate::{framework, log, runtime};

/// Declarations of methods, sorted by name.
#[derive(Clone, Debug, Default)]
pub struct Catalogue(Vec<MethodSpec>);

impl Catalogue {
    pub(crate) fn new(mut specs: Vec<MethodSpec>) -> Self {
        specs.sort_by_key(|spec| spec.name);
        Self(specs)
    }

    /// The methods that every server has: `rpc_*`, `spdk_*`, `framework_*`,
    /// `thread_*` and `log_*`. [`with`](Catalogue::with) adds those of modules.
    pub fn builtin() -> Self {
        Self::default().with(framework::METHODS).with(log::METHODS).with(runtime::METHODS)
    }

    /// Adds the methods of one table.
    pub fn with<C>(self, methods: &[Method<C>]) -> Self {
        let mut specs = self.0;
        specs.extend(methods.iter().map(|method| method.spec));
        Self::new(specs)
    }

    /// The declarations.
    pub fn specs(&self) -> &[MethodSpec] {
        &self.0
    }

    /// The declaration of a method, by its name or an alias.
    pub fn find(&self, name: &str) -> Option<&MethodSpec> {
        let names = |spec: &&MethodSpec| spec.name == name || spec.aliases.contains(&name);
        self.0.iter().find(names)
    }

    /// Names and aliases.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let names = |spec: &MethodSpec| [spec.name].into_iter().chain(spec.aliases.iter().copied());
        self.0.iter().flat_map(names)
    }

    /// Every method with its parameters and help, for a terminal.
    pub fn list(&self) -> String {
        let mut out = String::new();
        for spec in &self.0 {
            list_method(&mut out, spec);
            out.push('\n');
        }
        out
    }

    /// The reference page, in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::from(INTRODUCTION);
        let mut group = "";
        for spec in &self.0 {
            let prefix = spec.name.split('_').next().unwrap_or_default();
            if prefix != group {
                group = prefix;
                let _ = write!(out, "\n## {group}\n");
            }
            markdown_method(&mut out, spec);
        }
        out
    }
}

const INTRODUCTION: &str = "\
# JSON-RPC methods

Made from the server's method table: `ringstone rpc --list` shows the same. Call a method with
`ringstone rpc METHOD key=value ...`, with `ringstone rpc METHOD '{\"key\": value}'`, or by writing
`{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": ..., \"params\": {...}}` to the socket.

Parameters that a method does not know are refused. Methods marked *startup* are callable before
`framework_start_init`, those marked *runtime* after it. Methods marked *saved* change the
configuration; it is saved before they answer.
";

/// Help for one method, for a terminal.
pub fn list_method(out: &mut String, spec: &MethodSpec) {
    let _ = write!(out, "{}", spec.name);
    for alias in spec.aliases {
        let _ = write!(out, ", {alias}");
    }
    let _ = writeln!(out, "\n    {}", spec.help);
    let mut rows = Vec::new();
    flatten(spec.params, "", &mut rows);
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    for row in rows {
        let _ = writeln!(
            out,
            "      {:width$}  {}{}: {}",
            row.name,
            row.kind,
            if row.required { ", required" } else { "" },
            row.help,
        );
    }
    let _ = writeln!(out, "    Answers: {}", spec.result);
    if spec.states != States::RUNTIME {
        let _ = writeln!(out, "    Callable: {}", states(spec.states));
    }
}

fn markdown_method(out: &mut String, spec: &MethodSpec) {
    let _ = write!(out, "\n### {}\n\n{}", spec.name, spec.help);
    if !spec.aliases.is_empty() {
        let _ = write!(out, " Also known as {}.", spec.aliases.join(", "));
    }
    let saved = if spec.mutates { ", saved" } else { "" };
    let _ = write!(out, " *{}{saved}*\n\n", states(spec.states));
    let mut rows = Vec::new();
    flatten(spec.params, "", &mut rows);
    if !rows.is_empty() {
        out.push_str("| Parameter | Type | | Meaning |\n| --- | --- | --- | --- |\n");
        for row in rows {
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} |",
                row.name,
                cell(&row.kind),
                if row.required { "required" } else { "" },
                cell(&row.help),
            );
        }
        out.push('\n');
    }
    let _ = writeln!(out, "Answers {}.", spec.result);
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn states(states: States) -> &'static str {
    match (states.startup, states.runtime) {
        (true, true) => "startup, runtime",
        (true, false) => "startup",
        _ => "runtime",
    }
}

struct Row {
    name: String,
    kind: String,
    required: bool,
    help: String,
}

/// One row for each parameter; those of nested objects under dotted names.
fn flatten(params: &[Param], path: &str, rows: &mut Vec<Row>) {
    for param in params {
        let name = format!("{path}{}", param.name);
        let help = match param.deprecated {
            true => format!("{} (deprecated, without effect)", param.help),
            false => param.help.to_owned(),
        };
        rows.push(Row { name: name.clone(), kind: kind(param), required: param.required, help });
        match param.kind {
            Kind::Object(inner) => flatten(inner, &format!("{name}."), rows),
            Kind::Array(Kind::Object(inner)) => flatten(inner, &format!("{name}[]."), rows),
            _ => {}
        }
    }
}

fn kind(param: &Param) -> String {
    let unit = match param.kind {
        kind if kind.integer_range().is_some() => "",
        Kind::Str => " bytes",
        Kind::Array(_) => " items",
        _ => return param.kind.to_string(),
    };
    match (param.min, param.max) {
        (None, None) => param.kind.to_string(),
        (Some(min), None) => format!("{}, at least {min}{unit}", param.kind),
        (None, Some(max)) => format!("{}, at most {max}{unit}", param.kind),
        (Some(min), Some(max)) => format!("{}, {min} to {max}{unit}", param.kind),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const METHODS: &[Method<()>] = &[
        Method::new("shelf_put", "Put a box on the shelf.", |_, _| Box::pin(async { Ok(Value::Null) }))
            .aliases(&["shelf_add"])
            .mutates()
            .params(&[
                Param::required("name", Kind::Str, "its name").at_most(64),
                Param::optional("size", Kind::U32, "its size in bytes").at_least(512),
                Param::optional("old", Kind::Bool, "its age").deprecated(),
                Param::required("place", Kind::Object(&[Param::required("row", Kind::U8, "left|right")]), "where"),
            ])
            .result("the name"),
        Method::new("shelf_list", "List the boxes.", |_, _| Box::pin(async { Ok(Value::Null) })),
    ];

    #[test]
    fn finds_by_name_and_alias() {
        let catalogue = Catalogue::builtin().with(METHODS);
        assert_eq!(catalogue.find("shelf_add").unwrap().name, "shelf_put");
        assert_eq!(catalogue.find("shelf"), None);
        assert!(catalogue.names().any(|name| name == "shelf_add"));
        assert!(catalogue.specs().is_sorted_by_key(|spec| spec.name));
        for spec in catalogue.specs() {
            assert!(spec.help.ends_with('.'), "{}: help is a sentence", spec.name);
        }
    }

    #[test]
    fn list_shows_parameters() {
        assert_eq!(
            Catalogue::default().with(METHODS).list(),
            "\
shelf_list
    List the boxes.
    Answers: true

shelf_put, shelf_add
    Put a box on the shelf.
      name       a string, at most 64 bytes, required: its name
      size       a 32-bit unsigned number, at least 512: its size in bytes
      old        true or false: its age (deprecated, without effect)
      place      an object, required: where
      place.row  an 8-bit unsigned number, required: left|right
    Answers: the name

"
        );
    }

    #[test]
    fn markdown_shows_the_same() {
        let text = Catalogue::default().with(METHODS).markdown();
        assert!(text.starts_with("# JSON-RPC methods\n"));
        assert!(text.contains("\n## shelf\n\n### shelf_list\n\nList the boxes. *runtime*\n"));
        assert!(text.contains("Also known as shelf_add. *runtime, saved*"));
        assert!(text.contains("| place.row | an 8-bit unsigned number | required | left\\|right |\n"));
        assert_eq!(text.matches("\n## ").count(), 1);
    }
}
