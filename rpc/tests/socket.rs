//! The server on a real socket, with clients that behave and clients that
//! do not.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Connection, Folder, Running, Shelf};
use ringstone_rpc::{BindError, Client, ClientError, Limits, Server};
use serde_json::{Value, json};

const LIST: &str = r#"{"jsonrpc":"2.0","method":"shelf_list","id":1}"#;

/// Longer than any of these tests may take.
const LONG: Duration = Duration::from_secs(600);

#[test]
fn requests_may_come_byte_by_byte_and_all_at_once() {
    let server = Running::start();
    let requests = [
        json!({"method": "shelf_put", "params": {"name": "é"}, "id": 1}),
        json!([{"method": "shelf_put", "params": {"name": "b"}}, {"method": "shelf_list", "id": 2}]),
        json!({"method": "shelf_put", "params": {"name": "c"}}),
        json!({"method": "shelf_list", "id": 3}),
    ];
    let mut stream = String::new();
    for request in &requests {
        stream += &format!("{request:#}");
    }
    let check = |connection: &mut Connection| {
        assert_eq!(connection.reply().unwrap()["result"], "é");
        assert_eq!(connection.reply().unwrap()[0]["result"], json!(["é", "b"]));
        assert_eq!(connection.reply().unwrap()["result"], json!(["é", "b", "c"]));
        server.shelf.boxes.lock().unwrap().clear();
    };
    let mut connection = server.connect();
    connection.send(&stream);
    check(&mut connection);
    for byte in stream.as_bytes() {
        connection.stream.write_all(&[*byte]).unwrap();
    }
    check(&mut connection);
    for at in 0..stream.len() {
        let (first, second) = stream.as_bytes().split_at(at);
        connection.stream.write_all(first).unwrap();
        connection.stream.write_all(second).unwrap();
        check(&mut connection);
    }
}

#[test]
fn many_pipelined_requests_are_answered_in_order() {
    let server = Running::start();
    let mut connection = server.connect();
    let mut writer = connection.stream.try_clone().unwrap();
    // More than the buffers of both sides hold, so it must be read meanwhile.
    let count = 20_000;
    let thread = std::thread::spawn(move || {
        for id in 0..count {
            let request = json!({"method": "shelf_list", "id": id}).to_string();
            writer.write_all(request.as_bytes()).unwrap();
        }
    });
    for id in 0..count {
        assert_eq!(connection.reply().unwrap()["id"], id);
    }
    thread.join().unwrap();
}

#[test]
fn clients_do_not_wait_for_one_another() {
    let server = Running::start();
    let mut waiting = server.connect();
    waiting.send(r#"{"method":"shelf_wait","id":1}"#);
    let mut reading = server.connect();
    loop {
        // Each reply gives the other connection its turn.
        reading.send(LIST);
        assert_eq!(reading.reply().unwrap()["result"], json!([]));
        if server.shelf.waiting.load(Ordering::SeqCst) == 1 {
            break;
        }
    }
    reading.send(LIST);
    assert_eq!(reading.reply().unwrap()["result"], json!([]));
    server.shelf.gate.add_permits(1);
    assert_eq!(waiting.reply().unwrap()["result"], true);
}

#[test]
fn what_is_no_json_is_answered_and_ends_the_connection() {
    let server = Running::start();
    for (text, reason) in [
        (&b"hello"[..], "'h'"),
        (b"{\"method\" \"x\"}", "a colon"),
        (b"{\"method\":\"\xff\"}", "not UTF-8"),
        (b"{}]", "']'"),
        (b"GET / HTTP/1.1\r\n\r\n", "'G'"),
    ] {
        let mut connection = server.connect();
        connection.stream.write_all(text).unwrap();
        let mut reply = connection.reply().unwrap();
        if text.starts_with(b"{}") {
            assert_eq!(reply["error"]["code"], -32600);
            reply = connection.reply().unwrap();
        }
        assert_eq!(reply["error"]["code"], -32700);
        assert_eq!(reply["id"], Value::Null);
        let message = reply["error"]["message"].as_str().unwrap();
        assert!(message.contains(reason), "{message}");
        assert_eq!(connection.reply(), None);
    }
    let mut connection = server.connect();
    connection.send(&"[".repeat(10_000));
    let reply = connection.reply().unwrap();
    assert!(reply["error"]["message"].as_str().unwrap().contains("nested deeper"));
}

#[test]
fn large_requests_are_refused_in_words() {
    let server = Running::with(Limits { request_bytes: 1000, ..Limits::default() });
    let mut connection = server.connect();
    let name = "x".repeat(2000);
    connection.send(&json!({"method": "shelf_put", "params": {"name": name}, "id": 1}).to_string());
    let reply = connection.reply().unwrap();
    assert_eq!(reply["error"]["code"], -32700);
    assert_eq!(reply["error"]["message"], "Parse error: a value is larger than 1000 bytes");
    assert_eq!(connection.reply(), None);

    let mut connection = server.connect();
    connection.send(&" ".repeat(100_000));
    connection.send(LIST);
    assert_eq!(connection.reply().unwrap()["result"], json!([]));
}

#[test]
fn a_client_may_stop_writing_and_still_read() {
    let server = Running::start();
    let mut connection = server.connect();
    connection.send(LIST);
    connection.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(connection.reply().unwrap()["result"], json!([]));
    assert_eq!(connection.reply(), None);

    let mut connection = server.connect();
    connection.send("{\"method\":");
    connection.stream.shutdown(Shutdown::Write).unwrap();
    let reply = connection.reply().unwrap();
    assert_eq!(reply["error"]["message"], "Parse error: the stream ended inside a value");
    assert_eq!(connection.reply(), None);
}

#[test]
fn a_client_that_leaves_takes_nothing_with_it() {
    let server = Running::start();
    for text in ["", "{\"meth", LIST, r#"{"method":"shelf_large","params":{"bytes":9999999},"id":1}"#] {
        let mut connection = server.connect();
        connection.send(text);
    }
    let mut connection = server.connect();
    connection.send(LIST);
    assert_eq!(connection.reply().unwrap()["result"], json!([]));
}

#[test]
fn a_client_that_does_not_read_is_dropped() {
    let server = Running::with(Limits { reply_timeout: Duration::from_millis(50), ..Limits::default() });
    let mut connection = server.connect();
    connection.send(r#"{"method":"shelf_large","params":{"bytes":9999999},"id":1}"#);
    // Blocks until the server has given up on this connection.
    let mut byte = [0];
    let mut other = server.connect();
    loop {
        other.send(LIST);
        assert_eq!(other.reply().unwrap()["result"], json!([]));
        connection.stream.set_nonblocking(true).unwrap();
        match connection.stream.write(b" ") {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break,
            Err(error) => panic!("{error}"),
        }
    }
    connection.stream.set_nonblocking(false).unwrap();
    while matches!(connection.stream.read(&mut byte), Ok(1)) {}
}

#[test]
fn one_client_too_many_is_told_so() {
    let server = Running::with(Limits { clients: 2, ..Limits::default() });
    let mut first = server.connect();
    let mut second = server.connect();
    for connection in [&mut first, &mut second] {
        connection.send(LIST);
        assert!(connection.reply().is_some());
    }
    let mut third = server.connect();
    let reply = third.reply().unwrap();
    assert!(reply["error"]["message"].as_str().unwrap().contains("2 clients are connected"));
    assert_eq!(third.reply(), None);
    let error = Client::connect(&server.path, LONG).unwrap().call("shelf_list", Value::Null);
    assert!(matches!(error, Err(ClientError::Server { code: -32603, .. })), "{error:?}");

    // When one leaves there is room again.
    drop(first);
    loop {
        let mut next = server.connect();
        if next.stream.write_all(LIST.as_bytes()).is_ok()
            && next.reply().is_some_and(|reply| reply["result"] == json!([]))
        {
            break;
        }
    }
}

#[test]
fn the_socket_is_its_owners_and_goes_with_the_server() {
    let mut server = Running::start();
    let mode = fs::metadata(&server.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut idle = server.connect();
    idle.send(LIST);
    assert!(idle.reply().is_some());
    server.stop();
    assert_eq!(idle.reply(), None);
    let left: Vec<_> = fs::read_dir(&server.folder.0).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_request_that_runs_when_the_server_stops_is_answered() {
    let mut server = Running::with(Limits { stop_timeout: LONG, ..Limits::default() });
    let mut connection = server.connect();
    connection.send(r#"{"method":"shelf_wait","id":1}"#);
    let mut other = server.connect();
    while server.shelf.waiting.load(Ordering::SeqCst) == 0 {
        other.send(LIST);
        assert!(other.reply().is_some());
    }
    let shelf = server.shelf.clone();
    let thread = std::thread::spawn(move || {
        // The server is told to stop before the request may end: its socket
        // file is gone.
        assert_eq!(other.reply(), None);
        shelf.gate.add_permits(1);
        assert_eq!(connection.reply().unwrap()["result"], true);
        assert_eq!(connection.reply(), None);
    });
    server.stop();
    thread.join().unwrap();
}

#[test]
fn a_request_that_never_ends_does_not_keep_the_server() {
    let mut server = Running::with(Limits { stop_timeout: Duration::from_millis(10), ..Limits::default() });
    let mut connection = server.connect();
    connection.send(r#"{"method":"shelf_wait","id":1}"#);
    let mut other = server.connect();
    while server.shelf.waiting.load(Ordering::SeqCst) == 0 {
        other.send(LIST);
        assert!(other.reply().is_some());
    }
    server.stop();
    assert_eq!(connection.reply(), None);
}

#[test]
fn who_waits_for_ever_holds_no_place_once_gone() {
    let mut server = Running::with(Limits { clients: 3, stop_timeout: LONG, ..Limits::default() });
    let watching = |server: &Running, other: &mut Connection, count: usize| {
        while server.shelf.watching.load(Ordering::SeqCst) != count {
            other.send(LIST);
            assert!(other.reply().is_some());
        }
    };
    let mut other = server.connect();
    // More often than there are places. One may still be on its way back when the next is wanted.
    for _ in 0..5 {
        let mut waiting = server.connect();
        waiting.send(r#"{"method":"shelf_watch","id":1}"#);
        watching(&server, &mut other, 1);
        drop(waiting);
        watching(&server, &mut other, 0);
    }
    // Half closed is not gone; but the end of the server is the end.
    let mut waiting = server.connect();
    waiting.send(r#"{"method":"shelf_watch","id":1}"#);
    waiting.stream.shutdown(Shutdown::Write).unwrap();
    watching(&server, &mut other, 1);
    server.stop();
    assert_eq!(waiting.reply(), None);
}

#[test]
fn a_socket_that_a_killed_server_left_is_replaced() {
    let folder = Folder::new();
    let path = folder.file("rpc.sock");
    drop(UnixListener::bind(&path).unwrap());
    fs::write(folder.file("rpc.sock.lock"), "").unwrap();
    assert!(path.exists());
    let server = Server::bind(&path, Shelf::new().table(), Limits::default()).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_socket_in_use_is_left_alone() {
    let server = Running::start();
    let pid = std::process::id();
    let error = Server::bind(&server.path, Shelf::new().table(), Limits::default()).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }));
    let text = error.to_string();
    assert!(text.contains(&format!("in use by process {pid} (")), "{text}");
    assert!(text.contains("--rpc-socket"), "{text}");

    // By a program that knows no lock, too.
    let folder = Folder::new();
    let path = folder.file("other.sock");
    let _other = UnixListener::bind(&path).unwrap();
    let error = Server::bind(&path, Shelf::new().table(), Limits::default()).unwrap_err();
    assert!(error.to_string().contains(&format!("process {pid}")), "{error}");
    assert!(UnixStream::connect(&path).is_ok());

    let mut connection = server.connect();
    connection.send(LIST);
    assert!(connection.reply().is_some());
}

#[test]
fn paths_that_cannot_be_sockets_are_told() {
    let folder = Folder::new();
    let bind = |path: &std::path::Path| {
        let error = Server::bind(path, Shelf::new().table(), Limits::default()).unwrap_err();
        error.to_string()
    };
    let file = folder.file("file");
    fs::write(&file, "precious").unwrap();
    assert!(bind(&file).contains("is not a socket"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert!(bind(&folder.file(&"x".repeat(200))).contains("longer than the 107 bytes"));
    let text = bind(&folder.file("none/rpc.sock"));
    assert!(text.contains("No such file"), "{text}");
}

#[test]
fn the_client_calls_and_tells_errors_in_words() {
    let server = Running::start();
    let mut client = Client::connect(&server.path, LONG).unwrap();
    assert_eq!(client.call("shelf_put", json!({"name": "a"})).unwrap(), "a");
    assert_eq!(client.call("shelf_list", Value::Null).unwrap(), json!(["a"]));
    let large = client.call("shelf_large", json!({"bytes": 9_999_999})).unwrap();
    assert_eq!(large.as_str().unwrap().len(), 9_999_999);
    let error = client.call("shelf_put", json!({"name": "a"})).unwrap_err();
    assert_eq!(
        error.to_string(),
        "File exists: shelf_put: name \"a\": a box of that name is there already; \
         choose another name (code -17)"
    );
    let ClientError::Server { data, .. } = error else { panic!() };
    assert_eq!(data["field"], "name");
}

#[test]
fn the_client_says_why_there_is_no_server() {
    let folder = Folder::new();
    let connect = |path: &std::path::Path| Client::connect(path, LONG).unwrap_err().to_string();
    let path = folder.file("rpc.sock");
    assert!(connect(&path).contains("is `ringstone serve` running?"));
    drop(UnixListener::bind(&path).unwrap());
    assert!(connect(&path).contains("nobody answers at"));
    assert!(connect(&folder.file(&"x".repeat(200))).contains("107 bytes"));
}

#[test]
fn the_client_does_not_wait_for_ever() {
    let folder = Folder::new();
    let path = folder.file("rpc.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = Client::connect(&path, Duration::from_millis(20)).unwrap();
    let error = client.call("shelf_list", Value::Null).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error:?}");

    // The late reply to the first call is not taken for one to the second.
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"{\"id\":1,\"result\":\"late\"}{\"id\":2,\"result\":\"mine\"}").unwrap();
    client.set_timeout(LONG);
    assert_eq!(client.call("shelf_list", Value::Null).unwrap(), "mine");

    stream.write_all(b"{\"id\":3,\"nothing\":1}").unwrap();
    assert!(matches!(client.call("x", Value::Null), Err(ClientError::Protocol(_))));
    stream.write_all(b"???").unwrap();
    assert!(matches!(client.call("x", Value::Null), Err(ClientError::Protocol(_))));
    drop(stream);
    let mut client = Client::connect(&path, LONG).unwrap();
    drop(listener.accept().unwrap());
    assert!(matches!(client.call("x", Value::Null), Err(ClientError::Closed { .. })));
}
